"""An audit in a process of its own: `process.py OUT '{"settings": …}'`."""

import json
import sys

from tests.audit import tiny
from xviz_jax.audit import command


def main():
    options = {"model": "tests.audit.tiny:MODEL", "methods": "saliency"}
    options |= {"microbatch": 4, "shard_size": 8}
    options |= json.loads(sys.argv[2])
    source = options.pop("source", {})
    source["faults"] = {int(k): v for k, v in source.get("faults", {}).items()}
    options["data"] = tiny.Records(**source)
    return command.main({"out": sys.argv[1], **options})


if __name__ == "__main__":
    sys.exit(main())
