"""Slow readers of the synthetic tasks: {position: answer} from one row alone.

Each reads tokens as a person would who was told the rules, and shares nothing
with the code that drew them. Where nothing is asked, a reader has no entry.
"""

import re


def pairs(task, row):
  """MQAR and Rebinding: a key before a value binds, another one asks."""
  is_value = lambda x: task.keys <= x < task.keys + task.values
  known, answers = {}, {}
  for t in range(0, len(row), 2):
    if row[t] < task.keys:
      if t + 1 < len(row) and is_value(row[t + 1]):
        known[row[t]] = row[t + 1]
      else:
        answers[t] = known[row[t]]
  return answers


def two_hop(task, row):
  one, two = task.symbols, task.symbols + 1
  facts, answers = {}, {}
  for t in range(0, len(row), 2):
    subject, said = row[t : t + 2]
    if said < task.symbols:
      facts[subject] = said
    elif said == one:
      answers[t + 1] = facts[subject]
    elif said == two:
      answers[t + 1] = facts[facts[subject]]
  return answers


def copy(task, row):
  n = row.index(task.symbols)
  return {n + j: row[j] for j in range(n)}


def selective_copy(task, row):
  end = row.index(task.symbols)
  seen = [x for x in row[:end] if x < task.symbols]
  return dict(zip(range(end + 1, len(row)), seen, strict=True))


def palindrome(task, row):
  end = row.index(task.symbols)
  rest = row[:end]
  assert row[end + 1] == rest.pop()
  return {end + 1 + j: x for j, x in enumerate(reversed(rest))}


def stack(task, row):
  stacks = [[] for _ in range(task.stacks)]
  answers = {}
  for t in range(0, len(row) // 3 * 3, 3):
    operation, s, x = row[t], row[t + 1] - 2, row[t + 2]
    if operation == 0:
      stacks[s].append(x)
    else:
      answers[t + 1] = stacks[s].pop()
      assert answers[t + 1] == x
  return answers


def parity(task, row):
  return {t: sum(row[: t + 1]) % 2 for t in range(len(row))}


def s5(task, row):
  """Five objects that are moved about; the answer is where each now is."""
  names = _in_order(5)
  where, answers = list(range(5)), {}
  for t in range(0, len(row) // task.steps * task.steps, task.steps):
    move = names[row[t]]
    where = [move[place] for place in where]
    assert all(x == 120 for x in row[t + 1 : t + task.steps])
    answers[t + task.steps - 1] = names.index(tuple(where))
  return answers


def _in_order(n, taken=()):
  """All orders of n numbers, as in a dictionary."""
  if len(taken) == n:
    return [taken]
  rest = (x for x in range(n) if x not in taken)
  return [p for x in rest for p in _in_order(n, (*taken, x))]


def quote_gist(task, row):
  """The topic is that of most words."""
  first_topic = task.words + max(task.lines)
  gist, quote = first_topic + task.topics, first_topic + task.topics + 1
  lines, counts, answers = {}, [0] * task.topics, {}
  t = 0
  while row[t] != gist:
    lines[row[t]] = row[t + 1 : t + 1 + task.width]
    for word in lines[row[t]]:
      counts[word % task.topics] += 1
    t += 1 + task.width
  answers[t] = first_topic + counts.index(max(counts))
  for t, token in enumerate(row):
    if token == quote:
      for j, word in enumerate(lines[row[t + 1]]):
        answers[t + 1 + j] = word
  return answers


def multi_turn(task, row):
  now, answers = {}, {}
  for t in range(0, len(row) // 3 * 3, 3):
    kind, slot, said = row[t : t + 3]
    if kind == 0:
      assert now.get(slot) != said
      now[slot] = said
    elif kind == 2:
      assert said == 3  # DONE, not the answer
      answers[t + 1] = now[slot]
  return answers


def needle(task, row):
  assert row[0] == 256 and max(row[1:]) < 256
  text = bytes(row[1:])
  asked = re.search(
    rb'The special magic \w+ for (\w+) mentioned in the provided text is ', text
  )
  said = re.findall(
    rb'One of the special magic \w+s for %s is: (\w+)\. ' % asked[1], text
  )
  assert len(said) == 1
  # the text is one token behind, and answers stand at the byte before
  return {asked.end() + j: byte for j, byte in enumerate(said[0])}
