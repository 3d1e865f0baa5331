//! K and V storage by block, and how much of it fits.
//!
//! **Invariant:** `num_blocks` never exceeds what the step limits can use, and without an override never what memory allows.

use phalanx_formats::{Geometry, ShardPlan, StoredType, kv_block_bytes};
use phalanx_kernels::{DeviceMemoryInfo, KernelError, KvShape, Ops};
use phalanx_proto::{LoadModel, NodeId, RankCapacity, SamplerFeatures};

use crate::backend::ranks_here;
use crate::error::WorkerError;

/// Most bytes that a CPU rank takes for KV blocks by itself; `--num-gpu-blocks-override` goes beyond.
pub const HOST_CACHE_BYTES_MAX: u64 = 4 << 30;

/// Bytes of a device that are left for recorded steps and what the driver takes for them.
pub const DEVICE_RESERVE_BYTES: u64 = 512 << 20;

/// K and V of all layers on this rank.
pub struct KvCache<B: Ops> {
    layers: Vec<B::KvLayer>,
}

impl<B: Ops> KvCache<B> {
    /// Allocates all layers.
    ///
    /// # Errors
    /// No memory, or more slots than inputs can number.
    pub fn new(ops: &mut B, num_layers: usize, shape: KvShape) -> Result<Self, KernelError> {
        check_slots(&shape)?;
        Ok(Self { layers: (0..num_layers).map(|_| ops.kv_layer(shape)).collect::<Result<_, _>>()? })
    }

    /// The layers, first to last.
    pub fn layers_mut(&mut self) -> &mut [B::KvLayer] {
        &mut self.layers
    }
}

/// Inputs name slots by 32 bits.
fn check_slots(shape: &KvShape) -> Result<(), KernelError> {
    let num_slots = shape.num_blocks.checked_mul(shape.block_size);
    if num_slots.is_some_and(|num_slots| u32::try_from(num_slots).is_ok()) {
        return Ok(());
    }
    let reason = format!("{} blocks of {} slots are more than 32 bits number", shape.num_blocks, shape.block_size);
    Err(KernelError::Shape { op: "kv_layer", reason })
}

/// Element type of the cache: as asked for, or what the backend stores by itself.
///
/// # Errors
/// No type that a cache can have.
pub fn kv_dtype(load: &LoadModel, by_itself: StoredType) -> Result<StoredType, WorkerError> {
    match load.kv_cache_dtype.as_str() {
        "auto" | "" => Ok(by_itself),
        "float32" | "fp32" => Ok(StoredType::F32),
        "float16" | "fp16" => Ok(StoredType::F16),
        "bfloat16" | "bf16" => Ok(StoredType::BF16),
        other => Err(WorkerError::Setting {
            setting: "kv-cache-dtype",
            found: other.into(),
            expected: "auto, float16, bfloat16 or float32",
        }),
    }
}

/// What one rank's cache is cut from.
#[derive(Debug, Clone, Copy)]
pub struct KvBudget<'a> {
    /// The model's shape.
    pub geometry: &'a Geometry,
    /// This rank's part of it.
    pub plan: &'a ShardPlan,
    /// Element type.
    pub dtype: StoredType,
    /// This rank's node.
    pub node_id: &'a NodeId,
    /// Bytes of its weights, as held.
    pub weight_bytes: u64,
    /// Bytes that the machine can still give.
    pub free_bytes: u64,
    /// Memory of the device, where it is not the machine's.
    pub device: Option<DeviceMemoryInfo>,
}

impl KvBudget<'_> {
    /// How many blocks fit.
    ///
    /// # Errors
    /// Memory is too small for one sequence of the longest length.
    pub fn capacity(&self, load: &LoadModel) -> Result<RankCapacity, WorkerError> {
        let block_bytes = kv_block_bytes(self.geometry, self.plan, load.block_size as usize, self.dtype).max(1);
        let blocks_of_one = u64::from(load.max_model_len.div_ceil(load.block_size));
        let num_blocks = match load.num_blocks_override {
            Some(num_blocks) => u64::from(num_blocks),
            None => {
                let share = self.share(load);
                let fitting = share / block_bytes;
                if fitting < blocks_of_one {
                    return Err(WorkerError::KvMemory {
                        free_bytes: share,
                        needed_bytes: blocks_of_one * block_bytes,
                        weight_bytes: self.weight_bytes,
                        token_bytes: block_bytes / u64::from(load.block_size),
                        max_model_len: load.max_model_len,
                        fitting_len: fitting * u64::from(load.block_size),
                    });
                }
                // A host keeps what sequences cannot use; a device has no other use for it than cached prefixes.
                if self.device.is_some() { fitting } else { fitting.min(blocks_of_one * u64::from(load.max_num_seqs)) }
            }
        };
        let free_bytes = self.device.map_or(self.free_bytes, |device| device.free);
        Ok(RankCapacity {
            num_blocks,
            weight_bytes: self.weight_bytes,
            block_bytes,
            free_bytes,
            features: SamplerFeatures::default(),
        })
    }

    /// Bytes that the cache may take.
    fn share(&self, load: &LoadModel) -> u64 {
        if let Some(DeviceMemoryInfo { total, free }) = self.device {
            let allowed = (total as f64 * load.memory_utilization) as u64;
            return allowed.saturating_sub(total - free.min(total)).saturating_sub(DEVICE_RESERVE_BYTES);
        }
        let ranks_here = ranks_here(self.node_id, load) as u64;
        let share = (self.free_bytes as f64 * load.memory_utilization) as u64 / ranks_here;
        share.min(HOST_CACHE_BYTES_MAX)
    }
}

/// `MemAvailable` of this machine.
///
/// # Errors
/// The kernel does not say.
pub fn host_bytes_available() -> Result<u64, WorkerError> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(WorkerError::Meminfo)?;
    available(&text).ok_or_else(|| {
        WorkerError::Meminfo(std::io::Error::new(std::io::ErrorKind::InvalidData, "has no MemAvailable"))
    })
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use phalanx_formats::{Architecture, RopeScaling};
    use phalanx_proto::{Epoch, Term};

    use super::*;

    const GIB: u64 = 1 << 30;

    fn geometry() -> Geometry {
        Geometry {
            architecture: Architecture::Llama,
            hidden_size: 64,
            intermediate_size: 128,
            num_layers: 4,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            vocab_size: 100,
            max_position: 4096,
            norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            tied_embeddings: true,
            qkv_bias: false,
            sliding_window: None,
        }
    }

    fn load() -> LoadModel {
        LoadModel {
            term: Term(1),
            epoch: Epoch(1),
            model_path: String::new(),
            load_format: "auto".into(),
            dtype: "auto".into(),
            kv_cache_dtype: "auto".into(),
            world_size: 2,
            block_size: 16,
            max_model_len: 1000,
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            memory_utilization: 0.5,
            num_blocks_override: None,
            seed: 0,
            group_key: Vec::new(),
            rank_nodes: vec![NodeId("a".into()), NodeId("a".into())],
            steps_in_flight_max: 2,
            enforce_eager: false,
            disable_custom_all_reduce: false,
            collective_interface: String::new(),
            collective_ports: (0, 0),
        }
    }

    /// Blocks of a rank that holds one KV head: 4 layers x 2 x 16 slots x 16 values x 2 bytes.
    fn check(free_bytes: u64, change: fn(&mut LoadModel), expected: Option<u64>) {
        let (geometry, mut load) = (geometry(), load());
        change(&mut load);
        let plan = ShardPlan::new(&geometry, 2, 0, 1, 1);
        let node_id = &NodeId("a".into());
        let dtype = kv_dtype(&load, StoredType::F16).expect("a type");
        let budget =
            KvBudget { geometry: &geometry, plan: &plan, dtype, node_id, weight_bytes: 0, free_bytes, device: None };
        assert_eq!(budget.capacity(&load).ok().map(|capacity| capacity.num_blocks), expected);
    }

    #[test]
    fn slots_beyond_what_inputs_can_number_are_refused() {
        let fits = |num_blocks, block_size| {
            let dtype = StoredType::F16;
            check_slots(&KvShape { num_blocks, block_size, num_kv_heads: 1, head_dim: 16, dtype }).is_ok()
        };
        assert!(fits((1 << 28) - 1, 16));
        assert!(!fits(1 << 28, 16));
        assert!(!fits(usize::MAX, 16));
    }

    #[test]
    fn blocks_follow_memory_need_and_override() {
        let block_bytes = 4 * 2 * 16 * 16 * 2;
        check(4 * 100 * block_bytes, |_| {}, Some(100));
        check(4 * 62 * block_bytes, |_| {}, None);
        check(64 * GIB, |_| {}, Some(4 * 63));
        check(4 * 200 * block_bytes, |load| load.rank_nodes[1] = NodeId("b".into()), Some(4 * 63));
        check(4 * 100 * block_bytes, |load| load.kv_cache_dtype = "float32".into(), None);
        check(4 * 140 * block_bytes, |load| load.kv_cache_dtype = "float32".into(), Some(70));
        check(0, |load| load.num_blocks_override = Some(7), Some(7));
        check(
            64 * GIB,
            |load| (load.max_num_seqs, load.max_model_len) = (1 << 20, 4096),
            Some(HOST_CACHE_BYTES_MAX / block_bytes),
        );
    }

    #[test]
    fn a_device_gives_what_is_allowed_and_not_taken() {
        let (geometry, load) = (geometry(), load());
        let plan = ShardPlan::new(&geometry, 2, 0, 1, 1);
        let budget = |total, free| KvBudget {
            geometry: &geometry,
            plan: &plan,
            dtype: StoredType::F16,
            node_id: &load.rank_nodes[0],
            weight_bytes: 0,
            free_bytes: 0,
            device: Some(DeviceMemoryInfo { total, free }),
        };
        let num_blocks = |total, free| budget(total, free).capacity(&load).ok().map(|capacity| capacity.num_blocks);
        let block_bytes = 4 * 2 * 16 * 16 * 2;
        // Half of 8 GiB is allowed, 1 GiB is taken, half a GiB is kept back.
        assert_eq!(num_blocks(8 * GIB, 7 * GIB), Some(5 * GIB / 2 / block_bytes));
        assert_eq!(num_blocks(8 * GIB, 4 * GIB), None);
    }

    #[test]
    fn memory_is_read_from_the_kernel() {
        assert_eq!(available("MemTotal:  9 kB\nMemAvailable:    1234 kB\n"), Some(1234 * 1024));
        assert_eq!(available("MemTotal:  9 kB\n"), None);
        assert!(host_bytes_available().is_ok_and(|bytes| bytes > 0));
    }
}
