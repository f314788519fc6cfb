"""The table of all positive cases."""

from tests.tracing import zoo_control_flow, zoo_libraries, zoo_plain

CASES = [*zoo_plain.CASES, *zoo_libraries.CASES, *zoo_control_flow.CASES]

_names = [case.name for case in CASES]
assert len(set(_names)) == len(_names)
