"""A Ray cluster of two CPUs on this machine's loopback, until standard input ends.

Run as `python cluster.py FOLDER`, with a token in the file that RAY_AUTH_TOKEN_PATH names. The
first line on stdout is its address. No dashboard, no reports.
"""

from __future__ import annotations

import os
import sys

# Off Linux, Ray has its servers listen on the loopback alone; this variable has it do so here too.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
}

if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=80_000_000,
        _node_ip_address="127.0.0.1",
        _temp_dir=sys.argv[1],
    )
    sys.stdout.write(ray.get_runtime_context().gcs_address + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    ray.shutdown()
