"""`nki.collectives`: not simulated (the official simulator does not either)."""


def __getattr__(name):
    raise AttributeError(f"nki.collectives.{name} is not modelled by this simulator")
