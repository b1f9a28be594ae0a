"""Faults injected: the run goes on as if there had been none, or one clear error loses nothing."""
