"""Tasks about documents: quotes and topics, and state over a conversation."""

import dataclasses

import jax
import jax.numpy as jnp

from deltanet_jax.data.tasks import base


@dataclasses.dataclass(frozen=True)
class QuoteGist:
  """Questions about a document: its topic, and lines word by word.

  L lines of a line number and `width` words; then GIST, where the answer is the
  topic; then `quotes` times QUOTE, the number of a line, and the line: the
  answer at its number and at each word is the next word. Quoted lines are
  distinct. A word is of the topic with probability `topical`, else any; word w
  belongs to topic w mod `topics`. Shorter rows are padded with PAD.

  The topic is sampled, so in a few lines words of another may prevail. Only
  quotes need memory that grows with the document.

  Slices: kind (0 topic, 1 quote), lines (L), line (quoted, from 0) and word (of
  the quote, from 0), both -1 for the topic.
  """

  lines: tuple[int, ...] = (8, 16, 32)
  width: int = 6
  words: int = 64
  topics: int = 8
  topical: float = 0.5
  quotes: int = 1

  def __post_init__(self):
    base.check_least(self, width=1, topics=2, topical=0, quotes=1)
    base.check_sizes('lines', self.lines, self.quotes, 1 << 20)
    if self.words % self.topics or self.topical > 1:
      raise ValueError(
        f'words is {self.words}, topics {self.topics}, topical {self.topical};'
        ' give every topic as many words, and topical up to 1'
      )

  @property
  def vocab(self) -> int:
    # GIST, QUOTE and PAD
    return self.words + max(self.lines) + self.topics + 3

  @property
  def length(self) -> int:
    return (max(self.lines) + self.quotes) * (self.width + 1) + 1

  @property
  def levels(self) -> base.Levels:
    return {
      'kind': (0, 1),
      'lines': sorted(self.lines),
      'line': range(max(self.lines)),
      'word': range(self.width),
    }

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    T, L, W = self.length, max(self.lines), self.width + 1
    Q, B = self.quotes, batch
    rngs = jax.random.split(key, 6)
    n = base.draw_sizes(rngs[0], B, self.lines)[:, None]
    topic = jax.random.randint(rngs[1], (B, 1), 0, self.topics)
    any_word = jax.random.randint(rngs[2], (B, L, W - 1), 0, self.words)
    own = any_word - any_word % self.topics + topic[..., None]
    topical = jax.random.bernoulli(rngs[3], self.topical, own.shape)
    words = jnp.where(topical, own, any_word)
    i = jnp.arange(L)
    number = jnp.broadcast_to(self.words + i[:, None], (B, L, 1))
    lines = jnp.concatenate([number, words], -1)
    gist = self.words + L + self.topics  # then QUOTE and PAD
    tokens = jnp.full((B, T), gist + 2, jnp.int32)
    at = jnp.where(jnp.arange(L * W) < n * W, jnp.arange(L * W), T)
    tokens = base.place_values(tokens, at, lines.reshape(B, -1))
    tokens = base.place_values(tokens, n * W, jnp.full_like(n, gist))
    line = base.shuffle_valid(rngs[4], jnp.broadcast_to(i < n, (B, L)))[:, :Q]
    quoted = jnp.take_along_axis(lines, line[..., None], axis=1)  # [B,Q,W]
    start = n * W + 1 + jnp.arange(Q) * W
    tokens = base.place_values(tokens, start, jnp.full((B, Q), gist + 1))
    shown = (
      start[..., None] + 1 + jnp.arange(W - 1)
    )  # number and words but the last
    flat = lambda x: jnp.broadcast_to(x, (B, Q, W - 1)).reshape(B, -1)
    tokens = base.place_values(tokens, flat(shown), flat(quoted[..., :-1]))
    join = lambda first, rest: jnp.concatenate(
      [jnp.broadcast_to(first, (B, 1)), flat(rest)], 1
    )
    slices = {
      'kind': join(0, 1),
      'lines': n,
      'line': join(-1, line[..., None]),
      'word': join(-1, jnp.arange(W - 1)),
    }
    answers = join(self.words + L + topic, quoted[..., 1:])
    return base.make_example(tokens, join(n * W, shown), answers, slices)


@dataclasses.dataclass(frozen=True)
class MultiTurn:
  """A conversation of turns SET s x, CHAT c c and ASK s DONE.

  The answer to ASK, due at s and never shown, is the latest x of slot s, which
  was set before. A slot that is set again gets another value. `length` // 3
  turns; chat: share of turns of random `noise` tokens; other turns set or ask
  with equal probability.

  Slices: age (turns since s was set), updates (times it was set again), live
  (slots set so far).
  """

  length: int = 192
  slots: int = 16
  values: int = 32
  noise: int = 16
  chat: float = 0.4

  def __post_init__(self):
    base.check_least(self, length=6, slots=1, values=2, noise=1, chat=0)
    if self.chat >= 1:
      raise ValueError(f'chat is {self.chat}; give a share below 1')

  @property
  def vocab(self) -> int:
    return 4 + self.slots + self.values + self.noise

  @property
  def levels(self) -> base.Levels:
    turns, live = map(base.list_powers, (self.length // 3, self.slots))
    return {'age': turns, 'updates': (0, *turns), 'live': live}

  def sample(self, key: jax.Array, batch: int) -> base.Example:
    N, S = self.length // 3, self.slots
    rngs = jax.random.split(key, 5)
    chat = jax.random.bernoulli(rngs[0], self.chat, (N, batch))
    asks = jax.random.bernoulli(rngs[1], 0.5, (N, batch))
    order = jax.random.uniform(rngs[2], (N, batch, S))
    # difference to the value before, modulo values
    step = jax.random.randint(rngs[3], (N, batch), 1, self.values)
    noise = jax.random.randint(rngs[4], (N, batch, 2), 0, self.noise)
    row = jnp.arange(batch)

    def turn(memory, xs):
      value, when, times = memory
      t, chat, asks, order, step = xs
      live = times > 0
      asks = asks & live.any(-1) & ~chat
      sets = ~asks & ~chat
      # a random slot, for a question one of those set
      slot = jnp.argmax(jnp.where(live | sets[:, None], order, -1), -1)
      old = value[row, slot], when[row, slot], times[row, slot]
      new = (old[0] + step) % self.values, t, old[2] + 1
      keep = lambda x, a, b: x.at[row, slot].set(jnp.where(sets, b, a))
      memory = jax.tree.map(keep, memory, old, new)
      latest = jnp.where(sets, new[0], old[0])
      levels = t - old[1], old[2] - 1, live.sum(-1)
      return memory, (asks, slot, latest, *levels)

    empty = jnp.zeros((batch, S), jnp.int32)
    turns = jnp.arange(N), chat, asks, order, step
    _, columns = jax.lax.scan(turn, (empty, empty, empty), turns)
    columns = (x.T for x in (chat, *columns))
    chat, asks, slot, latest, age, updates, live = columns
    kind = jnp.where(chat, 1, jnp.where(asks, 2, 0))
    c = 4 + S + self.values + noise.transpose(1, 0, 2)
    second = jnp.where(chat, c[..., 0], 4 + slot)
    third = jnp.where(asks, 3, 4 + S + latest)
    third = jnp.where(chat, c[..., 1], third)
    triples = jnp.stack([kind, second, third], -1).reshape(batch, -1)
    tokens = jnp.full((batch, self.length), 3, jnp.int32)
    tokens = tokens.at[:, : 3 * N].set(triples)
    queries = jnp.where(asks, 3 * jnp.arange(N) + 1, self.length)
    slices = {'age': age, 'updates': updates, 'live': live}
    return base.make_example(tokens, queries, 4 + S + latest, slices)
