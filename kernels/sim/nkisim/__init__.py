"""The simulator behind the `nki` package of this directory.

`nki`, `nki.language` and `nki.isa` hold the public names of NKI 0.6; the rules live here:

* `dtypes`, `cast`: what a number is and how it rounds;
* `memory`, `tensor`, `view`: byte-addressed storage and strided views of it;
* `legal`, `operand`: what an instruction may touch, reading and writing operands;
* `alu`, `activations`: the operator tokens;
* `isa`: one module for each kind of instruction;
* `program`, `trace`, `counters`, `liveness`: the running kernel and what it is seen to do;
* `launch`: arguments in, results out, one or two cores.

Numbers and rules come from the public NKI documentation; where it is silent the simulator refuses, where it says two
things there is a switch (`config.Settings`).
"""

from .config import Settings, configured
from .launch import Report, last_report

__all__ = ["Report", "Settings", "configured", "last_report"]
