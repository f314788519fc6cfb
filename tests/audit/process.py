"""An audit in a process of its own: `process.py OUT '{"settings": …}'`."""

import json
import sys
from pathlib import Path

from tests.audit import tiny
from xviz_jax.audit import command


def main():
    options = {"model": "tests.audit.tiny:MODEL", "methods": "saliency"}
    options |= {"microbatch": 4, "shard_size": 8}
    options |= json.loads(sys.argv[2])
    source = options.pop("source", {})
    source["faults"] = {int(k): v for k, v in source.get("faults", {}).items()}
    options["data"] = tiny.Records(**source)
    code = command.main({"out": sys.argv[1], **options})
    status = Path("/proc/self/status").read_text().splitlines()
    # Not of getrusage, which begins with what the parent had when it forked.
    print("peak", *[line.split(":")[1].strip() for line in status if "VmHWM" in line])
    return code


if __name__ == "__main__":
    sys.exit(main())
