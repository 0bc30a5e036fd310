"""`python -m gmkernels.info`: versions, build, CPU, GPUs, and which backend runs which op."""

import platform

import torch

import gmkernels
from gmkernels import dispatch


def _facts() -> dict[str, str]:
    facts = {
        "gmkernels": gmkernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(dispatch.triton, "__version__", dispatch._triton_reason),
        "cpu": platform.processor() or platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    if dispatch.extension is None:
        facts["native"] = dispatch._extension_reason
    else:
        facts |= {k: str(v) for k, v in dispatch.extension.build_info().items() if k != "version"}
        features = dispatch.extension.cpu_features()
        facts["cpu features"] = ", ".join(name for name, has in features.items() if has)
        facts["isa"] = dispatch.extension.isa()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["gpus"] = ", ".join(gpus) or "none"
    return facts


def text() -> str:
    """The report."""
    facts = _facts()
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        lines.append(f"\nop on {device}: backends in order of choice")
        for op in dispatch._TABLE:
            order = [
                b for b in dispatch.ORDER[device] if dispatch.why_not(op, b, device, False) is None
            ]
            others = [
                f"{b}: {dispatch.why_not(op, b, device, False) or 'when named'}"
                for b in dispatch.BACKENDS
                if b not in order
            ]
            lines.append(f"  {op}: {', '.join(order)}" + "".join(f"\n    {o}" for o in others))
    return "\n".join(lines)


if __name__ == "__main__":
    print(text())
