"""The names of the forms of each rule, for checks before jax is imported.

The forms themselves are in `ops`, and what `kernels` adds to them.
"""

OWN = ('recurrent', 'associative', 'chunked')
# a kernel's name joins the row of its rule
FORMS = {
  'linear_attention': OWN,
  'delta_rule': (*OWN, 'kernel'),
  'kda': (*OWN, 'kernel'),
}
