//! Environment variables that nobody sets on another machine: each makes a program load or run something.
//!
//! **Invariant:** both ends refuse them, the head when a deployment is asked for and the agent before it starts a rank.

/// Beginnings of names that are refused.
const PREFIXES: [&str; 11] =
    ["LD_", "DYLD_", "PHALANX_", "PYTHON", "PERL", "RUBY", "BASH_FUNC_", "GIT_", "SSH_", "MALLOC_", "SUDO_"];

/// Names that are refused.
const NAMES: [&str; 43] = [
    "PATH",
    "HOME",
    "SHELL",
    "IFS",
    "ENV",
    "BASH_ENV",
    "CDPATH",
    "PROMPT_COMMAND",
    "NODE_OPTIONS",
    "JAVA_TOOL_OPTIONS",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "XDG_STATE_HOME",
    "XDG_CONFIG_HOME",
    "GCONV_PATH",
    "GETCONF_DIR",
    "GLIBC_TUNABLES",
    "HOSTALIASES",
    "LOCALDOMAIN",
    "LOCPATH",
    "NIS_PATH",
    "NLSPATH",
    "RESOLV_HOST_CONF",
    "RES_OPTIONS",
    "TZDIR",
    "OPENSSL_CONF",
    "OPENSSL_ENGINES",
    "OPENSSL_MODULES",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_INJECTION32_PATH",
    "CUDA_INJECTION64_PATH",
    "NVTX_INJECTION64_PATH",
    "ROCM_PATH",
    "HIP_PATH",
    "HSA_TOOLS_LIB",
    "ROCP_TOOL_LIB",
    "RDMAV_DRIVERS",
    "IBV_DRIVERS",
    "NCCL_CONF_FILE",
    "NCCL_GIN_PLUGIN",
    "NCCL_DEBUG_FILE",
    "NCCL_TOPO_DUMP_FILE",
];

/// What may be set although its name begins like others that may not: the log filter of a rank.
const HARMLESS: [&str; 1] = ["PHALANX_LOG"];

/// Parts of names that are refused: libraries that NCCL, RCCL and others load by name.
const PARTS: [&str; 2] = ["_PLUGIN", "PRELOAD"];

/// Endings of names that hold secrets: a rank gets none of them from its agent's environment.
const SECRETS: [&str; 6] = ["TOKEN", "SECRET", "PASSWORD", "PASSWD", "API_KEY", "ACCESS_KEY"];

/// Why a deployment may not set this variable; `None` where it may.
pub fn refusal(name: &str) -> Option<&'static str> {
    let is_name = !name.is_empty()
        && !name.starts_with(|first: char| first.is_ascii_digit())
        && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
    if !is_name {
        return Some("it is no name of a variable");
    }
    let upper = name.to_ascii_uppercase();
    if HARMLESS.contains(&name) {
        return None;
    }
    let decides = PREFIXES.iter().any(|prefix| upper.starts_with(prefix))
        || NAMES.contains(&upper.as_str())
        || PARTS.iter().any(|part| upper.contains(part));
    decides.then_some("it decides what programs load, run or believe; set it where the machine's agent is started")
}

/// Whether a variable of the agent's own environment is a secret that its ranks need not have.
pub fn is_secret(name: &str) -> bool {
    let upper = name.to_ascii_uppercase();
    SECRETS.iter().any(|ending| upper.ends_with(ending)) || upper == "PHALANX_TOKEN_FILE"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_loads_or_runs_is_refused() {
        for name in [
            "LD_PRELOAD",
            "ld_library_path",
            "PATH",
            "PHALANX_HOME",
            "NCCL_NET_PLUGIN",
            "NCCL_TUNER_PLUGIN",
            "CUDA_INJECTION64_PATH",
            "PYTHONPATH",
            "BASH_ENV",
            "",
            "A=B",
            "1A",
            "A\0",
        ] {
            assert!(refusal(name).is_some(), "{name:?}");
        }
        for name in [
            "HF_ENDPOINT",
            "PHALANX_LOG",
            "NCCL_SOCKET_IFNAME",
            "NCCL_DEBUG",
            "RUST_LOG",
            "OMP_NUM_THREADS",
            "A",
            "_b1",
        ] {
            assert_eq!(refusal(name), None, "{name}");
        }
    }

    #[test]
    fn secrets_stay_with_the_agent() {
        assert!(["PHALANX_TOKEN", "HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"].into_iter().all(is_secret));
        assert!(!["PHALANX_HOME", "HF_ENDPOINT", "TOKENIZERS_PARALLELISM"].into_iter().any(is_secret));
    }
}
