"""Ctrl-C at every point of a call."""

import dis
import gc
import sys


def interrupted_at(point, action, counts):
    """Runs `action` with a KeyboardInterrupt at the n-th point where CPython may run a signal handler.

    Those are the start of a Python function, the end of a call, and a jump backward, in the files for whose name
    `counts` is true. Returns whether there was such a point.
    """
    points, call_ended, code_bytes = 0, {}, {}

    def trace(frame, event, argument):
        nonlocal points
        if not counts(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes = True
        here = event == "call"
        if event == "opcode":
            here = call_ended.get(frame, False)
            code = code_bytes.setdefault(frame.f_code, frame.f_code.co_code)
            call_ended[frame] = dis.opname[code[frame.f_lasti]].startswith(("CALL", "JUMP_BACKWARD"))
        if here:
            points += 1
            if points == point:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    gc.disable()  # other packages' collection callbacks would swallow the interrupt
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
        gc.enable()
        call_ended.clear()  # frames hold `trace`, and so themselves
    return False
