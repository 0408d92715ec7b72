"""The error of what a user gives to `fastlm.energy`; this package stands alone, so it has one of its own."""


class EnergyError(ValueError):
    """What was given cannot be used; the message says what it was and what it must be."""
