"""Other transfer libraries as the handoff benchmark's peers: WRITEs of paged memory into another process.

usage: transfer_speed.py nixl|mooncake PAYLOAD_MIB REPEATS BLOCK_KIB...

Moves the payload in blocks of each size, the initiator's in order, the target's permuted (seed 7), so that neighbours cannot be merged. The target is this script
in a process of its own. One repeat more than asked for warms up, and after it every byte is compared. One JSON object a line:
{"block_kib": B, "gbps": [...], "cpu_s_per_gb": [...]}, CPU seconds of both processes; or {"block_kib": B, "error": ...}.

HUGE=1 asks for huge pages. NIXL: UCX_TLS and the like as UCX has it, PROGRESS=0 stops the initiator's progress thread, ERRORS is the backend's error mode
(`peer`, the default, leaves only transports that notice a dead peer: no shared memory). Mooncake: its own MC_ variables; TCP.
"""

import base64
import json
import mmap
import os
import resource
import subprocess
import sys
import time

import numpy as np

library, payload = sys.argv[1], int(sys.argv[2]) << 20
is_target = sys.argv[3] == "target"
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # whatever a library prints is no answer


def memory():
    """Anonymous and private, every page touched."""
    pages = mmap.mmap(-1, payload, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if os.environ.get("HUGE") == "1":
        pages.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(pages, dtype=np.uint8)
    array[:] = 0
    return array


def pattern():
    return np.arange(payload // 8, dtype=np.uint64) * np.uint64(2654435761)


def places(block):
    """The target's block for each of the initiator's."""
    return np.random.default_rng(7).permutation(payload // block)


def cpu_s():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Nixl:
    def __init__(self, array):
        from nixl_cu12._api import nixl_agent, nixl_agent_config

        progress = is_target or os.environ.get("PROGRESS", "1") == "1"
        self.name = "target" if is_target else "initiator"
        self.agent = nixl_agent(self.name, nixl_agent_config(enable_prog_thread=progress, backends=[]))
        self.agent.create_backend("UCX", {"ucx_error_handling_mode": os.environ.get("ERRORS", "peer")})
        self.address = array.ctypes.data
        self.registered = self.agent.register_memory([(self.address, payload, 0, "")], "DRAM")

    def hello(self):
        return {"metadata": base64.b64encode(self.agent.get_agent_metadata()).decode(), "address": self.address}

    def connect(self, hello):
        self.agent.add_remote_agent(base64.b64decode(hello["metadata"]))
        self.agent.make_connection("target")
        self.remote = hello["address"]

    def _blocks(self, owner, address, block, order):
        blocks = np.zeros((len(order), 3), dtype=np.uint64)
        blocks[:, 0] = np.uint64(address) + order.astype(np.uint64) * np.uint64(block)
        blocks[:, 1] = block
        return self.agent.prep_xfer_dlist(owner, blocks, "DRAM")

    def prepare(self, block):
        count = payload // block
        self.all = np.arange(count, dtype=np.int32)
        self.local = self._blocks("NIXL_INIT_AGENT", self.address, block, np.arange(count))
        self.there = self._blocks("target", self.remote, block, places(block))

    def write(self):
        transfer = self.agent.make_prepped_xfer("WRITE", self.local, self.all, self.there, self.all)
        state = self.agent.transfer(transfer)
        while state == "PROC":
            state = self.agent.check_xfer_state(transfer)
        if state != "DONE":
            raise RuntimeError(f"the transfer is {state}")
        self.agent.release_xfer_handle(transfer)


class Mooncake:
    def __init__(self, array):
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        self.address = array.ctypes.data
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
            raise RuntimeError("the engine does not start")
        if self.engine.register_memory(self.address, payload) != 0:
            raise RuntimeError("the engine does not take the memory")

    def hello(self):
        return {"port": self.engine.get_rpc_port(), "address": self.address}

    def connect(self, hello):
        self.peer, self.remote = f"127.0.0.1:{hello['port']}", hello["address"]

    def prepare(self, block):
        count = payload // block
        self.local = (self.address + np.arange(count) * block).tolist()
        self.there = (self.remote + places(block) * block).tolist()
        self.lengths = [block] * count

    def write(self):
        code = self.engine.batch_transfer_sync_write(self.peer, self.local, self.there, self.lengths)
        if code != 0:
            raise RuntimeError(f"the transfer failed: {code}")


array = memory()
try:
    end = {"nixl": Nixl, "mooncake": Mooncake}[library](array)
except Exception as error:  # whatever keeps it from starting is the answer
    answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
    answers.flush()
    os._exit(1)

if is_target:
    answers.write(json.dumps(end.hello()) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        if "check" in asked:
            block = asked["check"]
            same = np.array_equal(array.reshape(-1, block)[places(block)].reshape(-1).view(np.uint64), pattern())
            array[:] = 0
            answers.write(json.dumps(bool(same)) + "\n")
        else:
            answers.write(json.dumps(cpu_s()) + "\n")
    os._exit(0)

repeats, blocks = int(sys.argv[3]), [int(kib) for kib in sys.argv[4:]]
array.view(np.uint64)[:] = pattern()
target = subprocess.Popen(
    [sys.executable, __file__, library, sys.argv[2], "target"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)


def ask(question):
    target.stdin.write(json.dumps(question) + "\n")
    target.stdin.flush()
    return json.loads(target.stdout.readline())


end.connect(json.loads(target.stdout.readline()))
for kib in blocks:
    answer = {"block_kib": kib, "gbps": [], "cpu_s_per_gb": []}
    try:
        end.prepare(kib << 10)
        for repeat in range(repeats + 1):
            cpu_before, before = cpu_s() + ask({}), time.perf_counter()
            end.write()
            seconds, cpu = time.perf_counter() - before, cpu_s() + ask({}) - cpu_before
            if repeat == 0:
                if not ask({"check": kib << 10}):
                    raise RuntimeError("wrong bytes arrived")
            else:
                answer["gbps"].append(payload / 1e9 / seconds)
                answer["cpu_s_per_gb"].append(cpu / (payload / 1e9))
    except Exception as error:
        answer = {"block_kib": kib, "error": f"{type(error).__name__}: {error}"}
    answers.write(json.dumps(answer) + "\n")
target.stdin.close()
target.wait(timeout=20)
os._exit(0)
