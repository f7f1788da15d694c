"""A worker process: reads tasks as JSON lines from standard input, answers each with a JSON line.

    python -m coterie.bench.worker

Standard output belongs to the answers; whatever else is printed goes to standard error. It ends
when its input ends, and when its parent does.
"""

import json
import os
import signal
import sys
import threading
import time

_WATCH_SECONDS = 0.5


def main() -> None:
    """Answer tasks until there are no more."""
    # The parent ends its workers itself, after it has said why.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    from coterie.bench.tasks import Worker, set_threads

    set_threads()
    worker = Worker()
    try:
        for line in sys.stdin:
            try:
                answer: dict[str, object] = {"answer": worker.do(json.loads(line))}
            except Exception as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
            answers.flush()
    except BrokenPipeError:
        pass  # the parent is gone: nobody waits for the answer
    finally:
        worker.close()


def _end_with(parent: int) -> None:
    """End this process at once when its parent is gone, however that ended: nobody waits for what it computes."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
