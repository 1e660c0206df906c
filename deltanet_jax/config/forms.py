"""The names of forms, for checks before jax is imported.

`ops` and `kernels` have the forms themselves; 'auto', which stands for one of
them, is chosen in `kernels`.
"""

OWN = ('recurrent', 'associative', 'chunked', 'tree')
# a kernel adds its name to the row of its rule
FORMS = {
  'linear_attention': (*OWN, 'kernel'),
  'delta_rule': (*OWN, 'kernel'),
  'kda': (*OWN, 'kernel'),
}
# of softmax attention
SOFTMAX = ('blocks', 'splash', 'cudnn')
