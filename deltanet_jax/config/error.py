"""What is wrong with what the user gave."""


class ConfigError(ValueError):
  """What the user gave cannot be run; the message says what to change."""
