"""A GPU to rehearse with: tensors that say cuda:0 and keep their data on the CPU.

With it every line of CUDA code runs on a machine without a GPU or a driver. What a GPU would refuse
is refused: an operator on tensors of two devices, a generator of the other device. What would make
the host wait for the GPU is counted by operator and place, and so are the bytes that are uploaded
and the operations.

It says nothing about speed, memory, or how the kernels of a GPU round: events tell the CPU's time.
Several processes, graphs and torch.compile are beyond it.

    import cuda_rehearsal  # before torch
    with cuda_rehearsal.Gpu():
        ...
"""
# ruff: noqa: E402  (what stands in for the driver must be there before torch)

import collections
import ctypes
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

# What PyTorch asks of the driver outside any operator: how many GPUs there are, and, in autograd's
# engine, whether one is in use. A file of the name libcuda.so.1 that is loaded first answers.
DRIVER = """
static signed char devices;

void set_device_count(int n) {
    devices = n;
}

signed char _ZN3c104cuda12device_countEv(void) {  /* c10::cuda::device_count() */
    return devices;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 0;
    return 0;
}
"""


def load_driver():
    "Compile DRIVER and load it; it stays loaded when its file is gone."
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "driver.c"
        library = Path(folder) / "libcuda.so.1"
        source.write_text(DRIVER)
        named = "-Wl,-soname,libcuda.so.1"
        subprocess.run(
            ["cc", "-shared", "-fPIC", named, "-o", str(library), str(source)], check=True
        )
        # global: PyTorch's own libraries, which come later, find these functions in place of theirs
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


if "torch" in sys.modules:
    raise RuntimeError("the rehearsal must be imported before torch, in a process of its own")
DRIVER_LIBRARY = load_driver()

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map

PACKAGE = str(Path(__file__).resolve().parent.parent / "reidnb")


class CannotFollow(RuntimeError):
    "The rehearsal, not the code that it runs, is at its end."

    def __init__(self, what):
        super().__init__(
            f"the rehearsal cannot follow torch {torch.__version__}: {what} "
            "(tests/cuda_rehearsal.py)"
        )


def internal(owner, name):
    "Return one of PyTorch's internals, or say that this version lacks it."
    if not hasattr(owner, name):
        raise CannotFollow(f"it has no {owner.__name__}.{name}")
    return getattr(owner, name)


# Without a GPU this puts a guard in place that lets cuda:0 be "the current device". It looks for
# GPUs, so there must be none before it. Afterwards autograd's engine asks whether each device that
# the guard could have is in use, and to ask for one that is not there is an error.
internal(torch._C, "_ensureCUDADeviceGuardSet")()
DRIVER_LIBRARY.set_device_count(16)

only_lift_cpu_tensors = internal(torch._C, "_set_only_lift_cpu_tensors")
no_torch_function = internal(torch._C, "_disabled_torch_function_impl")
aten = torch.ops.aten

# ---- What is counted

OPERATIONS = collections.Counter()  # operator -> times that a GPU would have been given work
WAITS = collections.Counter()  # (operator, file:function of the package) -> times the host waits
UPLOADED = collections.Counter()  # file:function -> bytes copied to the GPU, waited for or not


def place():
    "Return where in the package the present operator was called: file and function."
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "outside the package"


def count_wait(what):
    "Note that the host waits for the GPU here; that is an error or a warning where it is asked for."
    WAITS[what, place()] += 1
    if SyncDebug.mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
    if SyncDebug.mode == "warn":
        warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)


class SyncDebug:
    "What PyTorch does where the host waits, as `torch.cuda.set_sync_debug_mode` says."

    modes = ("default", "warn", "error")  # their numbers are 0, 1 and 2
    mode = "default"

    @classmethod
    def set(cls, mode):
        "Set it, by name or number."
        cls.mode = mode if mode in cls.modes else cls.modes[mode]

    @classmethod
    def get(cls):
        "Return its number."
        return cls.modes.index(cls.mode)


# ---- torch.cuda

ANSWERS = dict(
    is_available=True,
    is_initialized=True,
    _lazy_init=None,
    _is_in_bad_fork=False,
    device_count=1,
    current_device=0,
    current_stream=None,
    set_device=None,
    get_device_name="a rehearsal on the CPU",
    get_device_capability=(9, 0),
    is_bf16_supported=True,
    mem_get_info=(2**37, 2**37),  # bytes free, and all
    empty_cache=None,
    max_memory_allocated=0,
    memory_allocated=0,
    reset_peak_memory_stats=None,
)


def answering(value):
    "Make a function that returns `value`, whatever it is asked."

    def answer(*args, **kwargs):
        return value

    return answer


for _name, _value in ANSWERS.items():
    setattr(torch.cuda, _name, answering(_value))


def synchronize(device=None):
    "Wait for the GPU."
    count_wait("torch.cuda.synchronize")


class Event:
    "A moment: the GPU is done at once with what it is given."

    def __init__(self, enable_timing=False):
        self.seconds = None

    def record(self, stream=None):
        "Note the time."
        self.seconds = time.perf_counter()

    def elapsed_time(self, later):
        "Return the milliseconds until a later moment."
        return 1000 * (later.seconds - self.seconds)


torch.cuda.Event = Event
torch.cuda.synchronize = synchronize
torch.cuda.get_sync_debug_mode = SyncDebug.get
torch.cuda.set_sync_debug_mode = SyncDebug.set


class GpuGenerator:
    "The GPU's random generator: apart from the CPU's, so that one that is not restored shows."

    state = torch.Generator().manual_seed(0).get_state()

    @classmethod
    def seed(cls, seed):
        "Seed it, as torch.manual_seed does for all devices."
        cls.state = torch.Generator().manual_seed(seed).get_state()

    @classmethod
    def get(cls, device=None):
        "Return its state."
        return cls.state.clone()

    @classmethod
    def get_all(cls):
        "Return the states of all GPUs."
        return [cls.get()]

    @classmethod
    def set(cls, state, device=None):
        "Put it back to where it was."
        cls.state = state.clone()

    @classmethod
    def set_all(cls, states):
        "Put those of all GPUs back."
        cls.set(states[0])

    @classmethod
    def run(cls, op, args, kwargs):
        "Run an operator that samples, with this generator in the place of the CPU's."
        of_cpu = torch.default_generator.get_state()
        torch.default_generator.set_state(cls.state)
        try:
            return op(*args, **kwargs)
        finally:
            cls.state = torch.default_generator.get_state()
            torch.default_generator.set_state(of_cpu)


torch.cuda.manual_seed = GpuGenerator.seed
torch.cuda.manual_seed_all = GpuGenerator.seed
torch.cuda.get_rng_state = GpuGenerator.get
torch.cuda.get_rng_state_all = GpuGenerator.get_all
torch.cuda.set_rng_state = GpuGenerator.set
torch.cuda.set_rng_state_all = GpuGenerator.set_all

# ---- Tensors


class Cuda(torch.Tensor):
    "A tensor that says cuda:0; `held` is the CPU tensor with its data."

    __torch_function__ = no_torch_function  # operators are caught below autograd and autocast only

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="cuda:0",
        )

    def __init__(self, held):
        self.held = held

    def numpy(self, *, force=False):
        "Raise what a GPU's tensor raises; PyTorch says something else of every class but its own."
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, dtype=None, copy=None):
        return self.numpy()

    def tolist(self):
        "Return its numbers."
        return self.detach().cpu().tolist()

    # views and changes in place are written down by PyTorch only for classes that name their parts
    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(parts, *_):
        return Cuda(parts["held"])

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


class Gpu(TorchDispatchMode):
    "A block in which cuda is a device; operators without a tensor, as torch.zeros, are caught too."

    def __enter__(self):
        # torch.tensor(…, device="cuda") first makes its values on the CPU, then uploads them
        only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def on_gpu(x):
    "Return whether something is a tensor on the GPU."
    return isinstance(x, Cuda)


def held_by(x):
    "Return the data of a tensor on the GPU, and everything else as it is."
    return x.held if on_gpu(x) else x


def as_cuda(x):
    "Return a tensor as one on the GPU, and everything else as it is."
    if isinstance(x, torch.Tensor) and not on_gpu(x):
        return Cuda(x)
    return x


_save = torch.save


def save(value, file, *args, **kwargs):
    "Save tensors of the GPU by their data; a file of them is read with map_location='cpu' anyhow."
    with _disable_current_modes():
        _save(tree_map(held_by, value), file, *args, **kwargs)


torch.save = save

PINNED = {}  # address -> its tensor, kept so that the address stays its own


def pin_memory(x, device=None):
    "Copy a tensor to memory that a GPU can read while the host goes on."
    pinned = x.clone(memory_format=torch.preserve_format)
    PINNED[pinned.untyped_storage().data_ptr()] = pinned
    return pinned


torch.Tensor.pin_memory = pin_memory

# ---- Operators

COPIES = ("aten._to_copy.default", "aten.copy_.default")  # which go from one device to the other
# other operators that could; nothing here has called them yet
MAY_COPY = ("aten._foreach_copy", "aten._copy_from")
INDEXING = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")
# The host has to know a value, or the size of the result.
WAITING = {
    "aten._local_scalar_dense.default",
    "aten._unique2.default",
    "aten.bincount.default",
    "aten.equal.default",
    "aten.masked_select.default",
    "aten.nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten.unique_consecutive.default",
    "aten.unique_dim.default",
}
SMALL = 65536  # bytes of pageable memory that the driver takes at once, without a wait


def cudnn_batch_norm(x, weight, bias, mean, var, training, momentum, eps):
    "Normalise as cuDNN does; it returns one thing more, the memory for its backward pass."
    out = aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return *out, torch.empty(0)


def cudnn_batch_norm_backward(x, grad, weight, mean, var, saved_mean, saved_var, eps, reserve):
    "Go backward through `cudnn_batch_norm`."
    return aten.native_batch_norm_backward(
        grad, x, weight, mean, var, saved_mean, saved_var, True, eps, [True] * 3
    )


# operators that only a GPU has -> the same on the CPU
STAND_INS = {
    "aten.cudnn_batch_norm.default": cudnn_batch_norm,
    "aten.cudnn_batch_norm_backward.default": cudnn_batch_norm_backward,
}


def run(op, args, kwargs):
    "Run an operator on the data, if a GPU would; note where the host would wait for it."
    name = str(op)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    takes_gpu = any(on_gpu(x) for x in tensors)
    gives_gpu = is_result_on_gpu(name, args, kwargs, takes_gpu)
    refuse_other_generator(name, kwargs, gives_gpu)
    if not takes_gpu and not gives_gpu:
        return op(*args, **kwargs)
    if not op.is_view:
        OPERATIONS[name] += 1
    if takes_gpu:
        refuse_two_devices(op, args, tensors)
        count_waits(name, args)
    if name in COPIES:
        count_copy(name, args, kwargs, gives_gpu)
    result = run_on_data(op, args, kwargs, gives_gpu)
    if not gives_gpu:
        return result
    result = tree_map(as_cuda, result)
    if takes_gpu and name not in STAND_INS and name != "aten._to_copy.default":
        # a view shares its base's memory, and what changes in place returns itself
        return return_and_correct_aliasing(op, args, kwargs, result)
    return result


def is_result_on_gpu(name, args, kwargs, takes_gpu):
    "Return whether an operator's result is on the GPU."
    if name == "aten.copy_.default":
        return on_gpu(args[0])
    if kwargs.get("device") is None:
        return takes_gpu
    return torch.device(kwargs["device"]).type == "cuda"


def refuse_other_generator(name, kwargs, gives_gpu):
    "Raise an error where numbers on one device are sampled by a generator of another."
    generator = kwargs.get("generator")
    if generator is not None and (generator.device.type == "cuda") != gives_gpu:
        raise RuntimeError(f"{name}: the generator is on {generator.device}, the result is not")


def refuse_two_devices(op, args, tensors):
    "Raise an error where an operator takes tensors of both devices, and is none that may."
    name = str(op)
    # a CPU tensor of no dimension counts as a number
    of_cpu = [x for x in tensors if x.ndim > 0 and not on_gpu(x)]
    if name.startswith(INDEXING):
        values = args[2:3]
        refused = not on_gpu(args[0]) or any(x is v for x in of_cpu for v in values)
    else:
        refused = bool(of_cpu) and name not in COPIES
    if not refused:
        return
    if op.namespace != "aten" or name.startswith(MAY_COPY):
        raise CannotFollow(f"{name} takes tensors of both devices, and may be meant to")
    raise RuntimeError(
        f"{name}: Expected all tensors to be on the same device, found cuda:0 and cpu"
    )


def count_waits(name, args):
    "Count an operator on tensors of the GPU that the host waits for."
    if name in WAITING:
        count_wait(name)
    elif name.startswith(INDEXING):
        # with a single value PyTorch fills under a mask, and no index has to be known
        fills = len(args) > 2 and args[2].numel() == 1
        for index in args[1]:
            if index is None:
                continue
            if not on_gpu(index) or (index.dtype == torch.bool and not fills):
                count_wait(name)
                return


def count_copy(name, args, kwargs, gives_gpu):
    "Count a copy between the devices: its bytes upwards, and a wait unless the host may go on."
    if name == "aten.copy_.default":
        source = args[1]
        asynchronous = len(args) > 2 and args[2]
    else:
        source = args[0]
        asynchronous = kwargs.get("non_blocking", False)
    if source.numel() == 0 or on_gpu(source) == gives_gpu:
        return
    if not gives_gpu:
        count_wait("from the GPU")
        return
    UPLOADED[place()] += source.nbytes
    pinned = source.untyped_storage().data_ptr() in PINNED
    if not asynchronous or not (pinned or source.nbytes <= SMALL):
        count_wait("to the GPU")


def run_on_data(op, args, kwargs, gives_gpu):
    "Run an operator, or what stands in for it, on the CPU tensors that hold the data."
    args, kwargs = tree_map(held_by, args), tree_map(held_by, kwargs)
    if gives_gpu and kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    function = STAND_INS.get(str(op), op)
    try:
        if gives_gpu and is_random(op) and kwargs.get("generator") is None:
            return GpuGenerator.run(function, args, kwargs)
        return function(*args, **kwargs)
    except NotImplementedError as error:
        raise CannotFollow(f"{op} has no form for the CPU, and nothing stands in for it") from error


def is_random(op):
    "Return whether an operator samples from a device's generator."
    return torch.Tag.nondeterministic_seeded in op.tags


def try_out():
    "Take one gradient on the GPU, so that a version of PyTorch that cannot is named at once."
    try:
        with Gpu():
            x = torch.ones(2, device="cuda", requires_grad=True)
            (x * x).sum().backward()
            gradient = x.grad.tolist()
    except RuntimeError as error:
        raise CannotFollow(f"a first gradient fails ({error})") from error
    if gradient != [2.0, 2.0]:
        raise CannotFollow(f"a first gradient is {gradient}, not [2.0, 2.0]")
