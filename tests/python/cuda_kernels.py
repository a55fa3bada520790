"""Runs the CUDA engine's kernels on a device, each against a float64 reference, then times them beside the card's own limits.

usage: cuda_kernels.py KERNELS_DIR. Needs a GPU and PyTorch (for memory and references); JSON lines on stdout; exit status 1 if a kernel is wrong.
"""

import ctypes, glob, json, os, sys
import torch

torch.manual_seed(1)
DEV = "cuda"
folder = sys.argv[1]
wrong = []


def library(name):
    places = [name] + glob.glob(os.path.join(os.path.dirname(torch.__file__), "..", "nvidia", "*", "lib", name)) + ["/usr/local/cuda/lib64/" + name]
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    sys.exit(f"{name} was not found")


cuda, nvrtc = library("libcuda.so.1"), library("libnvrtc.so.13")


def ok(code, what):
    if code:
        sys.exit(f"{what}: error {code}")


def compile_source(name):
    major, minor = torch.cuda.get_device_capability()
    source = (open(f"{folder}/prelude.cu").read() + "\n" + open(f"{folder}/{name}.cu").read()).encode()
    program = ctypes.c_void_p()
    ok(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, f"{name}.cu".encode(), 0, None, None), "create")
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17"]
    ok(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)), f"compile {name}")
    size = ctypes.c_size_t()
    ok(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "size")
    cubin = ctypes.create_string_buffer(size.value)
    ok(nvrtc.nvrtcGetCUBIN(program, cubin), "cubin")
    module = ctypes.c_void_p()
    ok(cuda.cuModuleLoadData(ctypes.byref(module), cubin), "load")
    return module


torch.zeros(1, device=DEV)  # the primary context
modules = {name: compile_source(name) for name in ["linear", "rows", "decode_attention", "prefill_attention", "sample"]}


def function(module, name, shared=0):
    f = ctypes.c_void_p()
    ok(cuda.cuModuleGetFunction(ctypes.byref(f), modules[module], name.encode()), name)
    if shared:
        ok(cuda.cuFuncSetAttribute(f, 8, shared), "shared memory")
    return f


class Value(ctypes.Union):
    _fields_ = [("pad", ctypes.c_char * 64), ("on", ctypes.c_int)]


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", Value)]


class Config(ctypes.Structure):
    _fields_ = [(n, ctypes.c_uint) for n in ["gx", "gy", "gz", "bx", "by", "bz", "shared"]] + [
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(Attribute)), ("count", ctypes.c_uint)]


early = Attribute(id=6)  # programmatic stream serialization
early.value.on = 1


def launch(f, grid, block, arguments, shared=0, overlap=False):
    config = Config(*grid, *([1] * (3 - len(grid))), block, 1, 1, shared, torch.cuda.current_stream().cuda_stream, ctypes.pointer(early), int(overlap))
    pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in arguments])
    ok(cuda.cuLaunchKernelEx(ctypes.byref(config), f, pointers, None), "launch")


def at(tensor):
    return ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None)


def struct(*fields):
    """(ctype, value) pairs as one argument."""
    kind = type("Args", (ctypes.Structure,), {"_fields_": [(f"f{i}", t) for i, (t, _) in enumerate(fields)]})
    return kind(*[v for _, v in fields])


P = lambda tensor: (ctypes.c_void_p, tensor.data_ptr() if tensor is not None else None)
I = lambda value: (ctypes.c_int, value)
F = lambda value: (ctypes.c_float, value)


def report(**fields):
    print(json.dumps(fields), flush=True)


def check(what, got, reference, limit):
    got, reference = got.double(), reference.double()
    error = float((got - reference).norm() / reference.norm())
    good = error <= limit  # never true of NaN
    report(check=what, error=error, limit=limit, ok=good)
    if not good:
        wrong.append(what)


def normal(*shape, scale=1.0, dtype=torch.bfloat16):
    return (torch.randn(*shape, device=DEV, dtype=torch.float32) * scale).to(dtype)


def poison(*shape, dtype=torch.bfloat16):
    return torch.full(shape, float("nan"), device=DEV, dtype=dtype)


# ---- linears
def linear(kind, weight, x, out, n, k, r, tiles, residual=None, norm=None, squares_out=None, squares=None, overlap=False):
    rows = x.shape[0]
    per = 8 * r if kind == "gated" else 16 * r
    args = struct(P(weight), P(x), P(out), P(residual), P(norm), P(squares_out), P(squares), F(1e-5), I(rows), I(n), I(k))
    launch(function("linear", f"linear_{kind}_{r}_{tiles}"), (n // per,), 512, [args], overlap=overlap)


def check_linears():
    for (n, k, r) in [(6144, 4096, 3), (4096, 14336, 2), (576, 1536, 1), (960, 576, 2), (576, 576, 2), (49152, 576, 2)]:
        for rows in [1, 5, 8, 13, 16]:
            if r == 3 and rows > 8:
                continue
            tiles = 1 if rows <= 8 else 2
            w, x = normal(n, k, scale=k**-0.5), normal(rows, k)
            h = normal(rows, k, dtype=torch.float32)
            squares = (h.double() ** 2).view(rows, k // 16, 16).sum(-1).float().contiguous()
            scale = torch.rsqrt((h.double() ** 2).mean(-1, keepdim=True) + 1e-5)
            plain = x.double() @ w.double().T
            out = poison(rows, n)
            linear("store", w, x, out, n, k, r, tiles, squares=squares)
            check(f"linear_store {rows}x{n}x{k}", out, plain * scale, 3e-3)
            if rows == 8:
                one = torch.stack([(linear("store", w, x[i:i + 1].contiguous(), o := poison(1, n), n, k, r, 1, squares=squares[i:i + 1].contiguous()), o)[1][0] for i in range(8)])
                same = bool(torch.equal(one, out))
                report(check=f"rows of 8 equal rows alone {n}x{k}", ok=same)
                if not same:
                    wrong.append("rows")
            out = poison(rows, n, dtype=torch.float32)
            linear("logits", w, x, out, n, k, r, tiles)
            check(f"linear_logits {rows}x{n}x{k}", out, plain, 1e-4)
            before, norm = normal(rows, n, dtype=torch.float32), normal(n, dtype=torch.float32)
            residual, normed, sums = before.clone(), poison(rows, n), poison(rows, n // 16, dtype=torch.float32)
            linear("residual", w, x, normed, n, k, r, tiles, residual=residual, norm=norm, squares_out=sums)
            after = before.double() + plain
            check(f"linear_residual {rows}x{n}x{k}", residual, after, 1e-4)
            check("  its normed row", normed, after * norm.double(), 3e-3)
            check("  its squares", sums, (after**2).view(rows, n // 16, 16).sum(-1), 1e-3)
            if n % (16 * r) == 0 and n < 20000:
                half = n // 2
                if half % (8 * r) == 0:
                    out = poison(rows, half)
                    linear("gated", w, x, out, half, k, r, tiles, squares=squares)
                    gate, up = (plain * scale).split(half, dim=1)
                    check(f"linear_gated {rows}x{half}x{k}", out, gate * torch.sigmoid(gate) * up, 4e-3)


# ---- rows
def check_rows():
    for width in [576, 4096]:
        rows = 7
        table, tokens = normal(1000, width), torch.randint(0, 1000, (rows,), device=DEV, dtype=torch.int32)
        h = poison(rows, width, dtype=torch.float32)
        launch(function("rows", "embed"), (rows,), 128, [at(table), at(tokens), at(h), ctypes.c_int(width)])
        check(f"embed {width}", h, table[tokens.long()], 0.0)
        delta, norm, normed = normal(rows, width), normal(width, dtype=torch.float32), poison(rows, width)
        after = h.double() + delta.double()
        launch(function("rows", "rms_norm"), (rows,), 256, [at(h), at(delta), at(norm), at(normed), ctypes.c_int(width), ctypes.c_float(1e-5)])
        check(f"rms_norm residual {width}", h, after, 1e-6)
        check(f"rms_norm {width}", normed, after * torch.rsqrt((after**2).mean(-1, keepdim=True) + 1e-5) * norm.double(), 3e-3)
        squares = (after**2).view(rows, width // 16, 16).sum(-1).float().contiguous()
        last, out = torch.tensor([6, 2], device=DEV, dtype=torch.int32), poison(2, width)
        launch(function("rows", "gather"), (2,), 128, [at(normed), at(last), at(squares), at(out), ctypes.c_int(width), ctypes.c_float(1e-5)])
        check(f"gather {width}", out, normed[last.long()].double() * torch.rsqrt((after**2).mean(-1, keepdim=True) + 1e-5)[last.long()], 3e-3)
    pair, out = normal(5, 2 * 1536), poison(5, 1536)
    launch(function("rows", "silu_mul"), (2, 5), 128, [at(pair), at(out), ctypes.c_int(1536)])
    g, u = pair.double().split(1536, dim=1)
    check("silu_mul", out, g * torch.sigmoid(g) * u, 4e-3)


# ---- attention
def rotate(x, cos, sin, interleaved):
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def angles(d, positions, base=10000.0):
    frequencies = torch.tensor([base ** (-2 * i / d) for i in range(d // 2)], device=DEV, dtype=torch.float64)
    out = poison(positions, d // 2, 2, dtype=torch.float32)
    count = positions * d // 2
    launch(function("rows", "rope_angles"), ((count + 255) // 256,), 256, [at(out), at(frequencies), ctypes.c_int(d // 2), ctypes.c_int(positions)])
    a = torch.arange(positions, device=DEV, dtype=torch.float64)[:, None] * frequencies
    check(f"rope_angles {d}", out, torch.stack([a.cos(), a.sin()], -1), 1e-6)
    return out


def post(qkv, pool, positions, starts, tables, table, heads, kv, d, interleaved, bias=None, qn=None, kn=None):
    rows = qkv.shape[0]
    args = struct(P(qkv), P(pool), P(positions), P(starts), P(tables), P(table), P(bias), P(qn), P(kn), F(1e-5), I(rows), I(heads), I(kv), I(d), I(d), I(interleaved))
    launch(function("rows", "qkv_post"), (rows, (heads + 2 * kv + 7) // 8), 256, [args])


def attend(q, k, v, first_position, window=0):
    """q [rows, heads, d], k and v [tokens, kv, d], all float64."""
    rows, heads, d = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("rhd,thd->hrt", q, k) / d**0.5
    token, position = torch.arange(k.shape[0], device=DEV)[None], (torch.arange(rows, device=DEV) + first_position)[:, None]
    hidden = token > position
    if window:
        hidden |= token + window <= position
    return torch.einsum("hrt,thd->rhd", scores.masked_fill(hidden, -float("inf")).softmax(-1), v)


def filled_pool(tables, blocks, kv, d):
    return normal(blocks, 2, kv, 32, d)


def of_pool(pool, table, tokens):
    pages = pool[table.long()]  # [pages, 2, kv, 32, d]
    k, v = pages[:, 0], pages[:, 1]
    return [x.permute(0, 2, 1, 3).reshape(-1, x.shape[1], x.shape[3])[:tokens].double() for x in (k, v)]


def decode(qkv, pool, positions, starts, tables, heads, kv, d, out, grid, window=0, overlap=False, scratch={}):
    rows, chunks = qkv.shape[0], -(-(heads // kv) // 8)
    key = (rows, kv, chunks, d)
    if key not in scratch:
        cells = rows * kv * chunks
        scratch[key] = (poison(cells * 64 * 8 * d, dtype=torch.float32), poison(cells * 64 * 8 * 2, dtype=torch.float32), torch.zeros(cells, device=DEV, dtype=torch.int32))
    partials, spreads, finished = scratch[key]
    args = struct(P(qkv), P(pool), P(positions), P(starts), P(tables), P(out), P(partials), P(spreads), P(finished), F(1.4426950408889634 / d**0.5),
                  I(heads), I(kv), I(chunks), I(64), I(window))
    launch(function("decode_attention", f"decode_attention_{d}"), (grid, kv * chunks, rows), 128, [args], overlap=overlap)


def prefill(qkv, pool, tiles, tables, heads, kv, d, out, window=0):
    args = struct(P(qkv), P(pool), P(tiles), P(tables), P(out), F(1.4426950408889634 / d**0.5), I(heads), I(kv), I(window))
    shared = 2 * 64 * (2 * d + 64 + 2 * d + 16)
    launch(function("prefill_attention", f"prefill_attention_{d}", shared), (heads, tiles.shape[0]), 128, [args], shared=shared)


def int32(values):
    return torch.tensor(values, device=DEV, dtype=torch.int32)


def check_attention():
    for heads, kv, d, interleaved in [(9, 3, 64, 1), (32, 8, 128, 0), (14, 1, 64, 0)]:
        table = angles(d, 4096)
        for window in [0, 100]:
            lengths = [1, 31, 32, 33, 255, 256, 257, 700, 1500]
            pages = [-(-n // 32) for n in lengths]
            order = torch.randperm(sum(pages) + 3, device=DEV).int()
            tables, starts = order[: sum(pages)].contiguous(), int32([sum(pages[:i]) for i in range(len(pages))])
            pool, rows = filled_pool(tables, sum(pages) + 3, kv, d), len(lengths)
            positions, qkv = int32([n - 1 for n in lengths]), normal(rows, (heads + 2 * kv) * d)
            bias, qn, kn = (normal(n, dtype=torch.float32) for n in ((heads + 2 * kv) * d, d, d))
            given = qkv.double().view(rows, -1, d) + bias.double().view(-1, d)
            cos, sin = (table[positions.long(), :, i].double()[:, None] for i in (0, 1))
            rms = lambda x, w: x * torch.rsqrt((x**2).mean(-1, keepdim=True) + 1e-5) * w.double()
            q = rotate(rms(given[:, :heads], qn), cos, sin, interleaved)
            k = rotate(rms(given[:, heads:heads + kv], kn), cos, sin, interleaved)
            post(qkv, pool, positions, starts, tables, table, heads, kv, d, interleaved, bias, qn, kn)
            check(f"qkv_post queries {heads}/{kv}x{d}", qkv.view(rows, -1, d)[:, :heads], q, 3e-3)
            name = f"{heads}/{kv}x{d} window {window}"
            own = [of_pool(pool, tables[s:s + n], l) for s, n, l in zip(starts.tolist(), pages, lengths)]
            check("qkv_post keys", torch.stack([k[-1] for k, _ in own]), k, 3e-3)
            check("qkv_post values", torch.stack([v[-1] for _, v in own]), given[:, heads + kv:], 3e-3)
            reference = torch.stack([attend(qkv.double().view(rows, -1, d)[i:i + 1, :heads], *own[i], lengths[i] - 1, window)[0] for i in range(rows)])
            outs = []
            for grid in [1, 4, 16]:
                out = poison(rows, heads, d)
                for _ in range(2):  # the counters must be back at 0
                    decode(qkv, pool, positions, starts, tables, heads, kv, d, out, grid, window)
                check(f"decode_attention {name} grid {grid}", out, reference, 5e-3)
                outs.append(out)
            same = all(torch.equal(outs[0], out) for out in outs)
            report(check=f"decode_attention's bits whatever the grid {name}", ok=same)
            if not same:
                wrong.append("grid")
            # Two sequences' chunks: (context, rows).
            chunks, tiles, row = [(0, 150), (333, 77)], [], 0
            first = [7, 8]
            qkv = normal(227, (heads + 2 * kv) * d)
            references = []
            for (context, count), sequence in zip(chunks, first):
                keys, values = of_pool(pool, tables[starts[sequence]:starts[sequence] + pages[sequence]], context + count)
                references.append(attend(qkv[row:row + count].double().view(count, -1, d)[:, :heads], keys, values, context, window))
                tiles += [[row + i, min(64, count - i), context + i, int(starts[sequence])] for i in range(0, count, 64)]
                row += count
            out = poison(227, heads, d)
            prefill(qkv, pool, int32(tiles), tables, heads, kv, d, out, window)
            check(f"prefill_attention {name}", out, torch.cat(references), 5e-3)


def check_greedy():
    for vocabulary in [49152, 128256]:
        logits = normal(4, vocabulary, scale=3.0, dtype=torch.float32)
        logits[1, 777] = logits[1, 40000] = 50.0
        logits[3, 5] = float("nan")
        drawn = torch.zeros(4, 4, device=DEV, dtype=torch.int32)
        launch(function("sample", "greedy"), (4,), 1024, [at(logits), at(drawn), ctypes.c_int(vocabulary)])
        good = drawn[:3, 0].tolist() == [int(logits[0].argmax()), 777, int(logits[2].argmax())] and drawn[:, 2].tolist() == [1, 1, 1, 0]
        report(check=f"greedy {vocabulary}", ok=good)
        if not good:
            wrong.append("greedy")
        check("greedy's log-probability", drawn[:3, 1].contiguous().view(torch.float32), logits[:3].double().log_softmax(-1).max(-1).values, 1e-4)


# ---- times
def time_graph(work, runs=15):
    """Median ms of a graph's replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        times = []
        for _ in range(runs + 3):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(stream)
            graph.replay()
            b.record(stream)
            stream.synchronize()
            times.append(a.elapsed_time(b))
    return sorted(times[3:])[runs // 2]


def times():
    big = torch.empty(2 << 30, device=DEV, dtype=torch.uint8)
    copy = torch.empty_like(big)
    ms = time_graph(lambda: copy.copy_(big))
    bandwidth = 2 * big.numel() / ms / 1e9
    report(bench="copy", tb_per_s=round(bandwidth, 3), device=torch.cuda.get_device_name())
    del big, copy
    a, b = normal(8192, 8192), normal(8192, 8192)
    ms = time_graph(lambda: torch.mm(a, b))
    report(bench="bf16 product 8192", tflops=round(2 * 8192**3 / ms / 1e9, 1))
    del a, b
    # The decode step of Llama-3.1-8B's shape but embedding and sampling: 32 layers of distinct weights, the head, context 1152.
    e, ff, heads, kv, d, vocabulary, layers, context = 4096, 14336, 32, 8, 128, 128256, 32, 1152
    weights = [(normal(6144, e, scale=0.015), normal(e, e, scale=0.015), normal(2 * ff, e, scale=0.015), normal(e, ff, scale=0.008)) for _ in range(layers)]
    head, norm, table = normal(vocabulary, e, scale=0.015), torch.ones(e, device=DEV), angles(d, 2048, 500000.0)
    for batch in [1, 8, 16]:
        tiles, pages = (1 if batch <= 8 else 2), -(-context // 32)
        pools = [normal(batch * pages, 2, kv, 32, d) for _ in range(layers)]
        tables, starts = torch.randperm(batch * pages, device=DEV).int(), int32([i * pages for i in range(batch)])
        positions, tokens = int32([context - 1] * batch), int32([5] * batch)
        h, normed, qkv, attended = (torch.zeros(batch, n, device=DEV, dtype=t) for n, t in ((e, torch.float32), (e, torch.bfloat16), (6144, torch.bfloat16), (e, torch.bfloat16)))
        activated, logits = torch.zeros(batch, ff, device=DEV, dtype=torch.bfloat16), torch.zeros(batch, vocabulary, device=DEV)
        squares, drawn, last, out = torch.zeros(batch, e // 16, device=DEV), torch.zeros(batch, 4, device=DEV, dtype=torch.int32), int32(list(range(batch))), torch.zeros(batch, e, device=DEV, dtype=torch.bfloat16)
        grid = max(1, min(16, 528 // (kv * batch)))
        f = {n: function("rows", n) for n in ("embed", "rms_norm", "gather", "qkv_post")}

        def step(overlap, attention=True):
            launch(f["embed"], (batch,), 128, [at(head), at(tokens), at(h), ctypes.c_int(e)], overlap=overlap)
            launch(f["rms_norm"], (batch,), 512, [at(h), at(None), at(norm), at(normed), ctypes.c_int(e), ctypes.c_float(1e-5)], overlap=overlap)
            for i, (wq, wo, wg, wd) in enumerate(weights):
                linear("store", wq, normed, qkv, 6144, e, 3 if tiles == 1 else 2, tiles, squares=squares if i else None, overlap=overlap)
                args = struct(P(qkv), P(pools[i]), P(positions), P(starts), P(tables), P(table), P(None), P(None), P(None), F(1e-5), I(batch), I(heads), I(kv), I(d), I(d), I(0))
                if attention:
                    launch(f["qkv_post"], (batch, 6), 256, [args], overlap=overlap)
                    decode(qkv, pools[i], positions, starts, tables, heads, kv, d, attended, grid, overlap=overlap)
                linear("residual", wo, attended, normed, e, e, 2, tiles, residual=h, norm=norm, squares_out=squares, overlap=overlap)
                linear("gated", wg, normed, activated, ff, e, 2, tiles, squares=squares, overlap=overlap)
                linear("residual", wd, activated, normed, e, ff, 2, tiles, residual=h, norm=norm, squares_out=squares, overlap=overlap)
            launch(f["gather"], (batch,), 128, [at(normed), at(last), at(squares), at(out), ctypes.c_int(e), ctypes.c_float(1e-5)], overlap=overlap)
            linear("logits", head, out, logits, vocabulary, e, 2, tiles, overlap=overlap)
            launch(function("sample", "greedy"), (batch,), 1024, [at(logits), at(drawn), ctypes.c_int(vocabulary)], overlap=overlap)

        floor = (15.009e9 + batch * context * 131072) / bandwidth / 1e9
        for overlap, attention in [(True, True), (False, True), (True, False)]:
            ms = time_graph(lambda: step(overlap, attention))
            report(bench=f"llama8b kernels, batch {batch}", overlap=overlap, attention=attention, ms=round(ms, 3), floor_ms=round(floor, 3))
        step(False); torch.cuda.synchronize(); plain = drawn.clone(), logits.clone()
        same = True
        for _ in range(5):
            step(True); torch.cuda.synchronize()
            same &= torch.equal(plain[1], logits)
        report(check=f"overlapped launches give the plain chain's bits, batch {batch}", ok=bool(same), finite=bool(logits.isfinite().all()))
        if not same:
            wrong.append("overlap")
        del pools
    del weights, head
    for batch in [32, 128]:
        pages = -(-context // 32)
        pools = [normal(batch * pages, 2, kv, 32, d) for _ in range(4)]
        tables, starts = torch.randperm(batch * pages, device=DEV).int(), int32([i * pages for i in range(batch)])
        positions, qkv, out = int32([context - 1] * batch), normal(batch, 6144), poison(batch, e)
        for grid in [1, 2, 5]:
            ms = time_graph(lambda: [decode(qkv, pool, positions, starts, tables, heads, kv, d, out, grid, overlap=True) for pool in pools]) / 4
            report(bench=f"decode attention, batch {batch}, grid {grid}", us=round(ms * 1e3, 1), tb_per_s=round(batch * context * 4096 / ms / 1e9, 3))
        del pools
    for tokens in [512, 2048, 8192]:
        pool, tables = normal(tokens // 32, 2, kv, 32, d), torch.randperm(tokens // 32, device=DEV).int()
        qkv, out = normal(tokens, 6144), poison(tokens, e)
        tiles = int32([[i, 64, i, 0] for i in reversed(range(0, tokens, 64))])
        ms = time_graph(lambda: prefill(qkv, pool, tiles, tables, heads, kv, d, out))
        report(bench=f"prefill attention, {tokens} tokens", us=round(ms * 1e3, 1), tflops=round(2 * tokens * tokens * heads * d / ms / 1e9, 1))


check_linears()
check_rows()
check_attention()
check_greedy()
report(checks_failed=wrong)
times()
report(checks_failed=wrong)
sys.exit(1 if wrong else 0)
