//! The memory through which the GPUs of one node exchange: its layout, the argument that says where it lies, and the record that a
//! failed wait leaves.
//!
//! Owns what `cuda/peer.cuh` and the host must agree on. Plain arithmetic: knows no driver, no stream, no process.
//!
//! **Invariant:** an offset means the same on every rank, and no two regions overlap.

use std::fmt;

use super::peer_plan::PeerOp;

/// Most ranks of a node that exchange by peer memory.
pub const WORLD_MAX: usize = 8;
/// Most blocks of a launch that waits.
pub const BLOCKS_MAX: u32 = 256;
/// Most rows that have a sequence number.
pub const ROWS_MAX: u32 = 8192;
/// Bytes of control words at the head of a symmetric buffer.
const CONTROL_BYTES: u64 = 65536;

/// What a group wants to exchange without going in pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLimits {
    /// Ranks.
    pub world_size: u32,
    /// Most rows of a fused reduction.
    pub rows_max: u32,
    /// Most bytes of such a row.
    pub row_bytes_max: u32,
    /// Most bytes that a rank contributes to a gather of small records.
    pub gather_bytes_max: u32,
    /// Most bytes of a pull; larger ones and staged gathers go in pieces.
    pub staging_bytes_max: u32,
    /// Most bytes of a two-shot reduction; larger ones go in pieces.
    pub scatter_bytes_max: u32,
}

/// Where the regions of a symmetric buffer lie, the same on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerLayout {
    limits: PeerLimits,
    inbox: u64,
    gather: u64,
    staging: u64,
    scatter: u64,
    bytes: u64,
}

impl PeerLayout {
    /// Lays the regions out; sizes are rounded up to what the kernels ask for.
    ///
    /// # Errors
    /// A limit that no kernel can serve; the caller takes another transport.
    pub fn new(limits: PeerLimits) -> Result<Self, PeerPlanError> {
        let world = limits.world_size;
        if world < 2 || world as usize > WORLD_MAX {
            return Err(PeerPlanError::WorldSize { world_size: world });
        }
        if limits.rows_max == 0 || limits.rows_max > ROWS_MAX {
            return Err(PeerPlanError::Rows { rows: limits.rows_max });
        }
        let limits = PeerLimits {
            row_bytes_max: rounded(limits.row_bytes_max, 16)?,
            gather_bytes_max: rounded(limits.gather_bytes_max, 16)?,
            staging_bytes_max: rounded(limits.staging_bytes_max, 16 * world)?,
            scatter_bytes_max: rounded(limits.scatter_bytes_max, 16 * world)?,
            ..limits
        };
        let inbox = CONTROL_BYTES;
        let rows = u64::from(limits.rows_max) * u64::from(limits.row_bytes_max);
        let gather = inbox + aligned(2 * u64::from(world) * rows);
        let staging = gather + aligned(4 * u64::from(world) * u64::from(limits.gather_bytes_max));
        let scatter = staging + aligned(2 * u64::from(limits.staging_bytes_max));
        let bytes = scatter + aligned(4 * u64::from(limits.scatter_bytes_max));
        Ok(Self { limits, inbox, gather, staging, scatter, bytes })
    }

    /// Bytes that each rank allocates. All of them are zeroed on all ranks before the first launch on any.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The limits as rounded.
    pub fn limits(&self) -> &PeerLimits {
        &self.limits
    }

    /// What every launch of a rank gets. `base`: the symmetric buffers in rank order, as this process maps them.
    ///
    /// # Errors
    /// As many buffers as ranks, and a rank among them, are needed.
    pub fn group(&self, rank: u32, base: &[u64], host: HostWords) -> Result<PeerGroup, PeerPlanError> {
        let world = self.limits.world_size;
        if base.len() != world as usize || rank >= world {
            return Err(PeerPlanError::Ranks { rank, buffers: base.len(), world_size: world });
        }
        let mut bases = [0; WORLD_MAX];
        bases.iter_mut().zip(base).for_each(|(to, from)| *to = *from);
        Ok(PeerGroup {
            base: bases,
            abort_word: host.abort,
            status_word: host.status,
            limit_ns: host.limit_ns,
            inbox: self.inbox,
            gather: self.gather,
            staging: self.staging,
            scatter: self.scatter,
            rank,
            world_size: world,
            rows: self.limits.rows_max,
            row_bytes: self.limits.row_bytes_max,
            gather_bytes: self.limits.gather_bytes_max,
            staging_bytes: self.limits.staging_bytes_max,
            scatter_bytes: self.limits.scatter_bytes_max,
            reserved: 0,
        })
    }
}

/// Device addresses of two words in host-mapped memory, and how long a kernel waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostWords {
    /// A u32: the host sets it to end all waits.
    pub abort: u64,
    /// A u64: zero, or the record of the first wait that was given up (`PeerFailure::from_status`).
    pub status: u64,
    /// The longest wait.
    pub limit_ns: u64,
}

/// `PeerGroup` of `cuda/peer.cuh`, passed by value as the first argument of every kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerGroup {
    base: [u64; WORLD_MAX],
    abort_word: u64,
    status_word: u64,
    limit_ns: u64,
    inbox: u64,
    gather: u64,
    staging: u64,
    scatter: u64,
    rank: u32,
    world_size: u32,
    rows: u32,
    row_bytes: u32,
    gather_bytes: u32,
    staging_bytes: u32,
    scatter_bytes: u32,
    reserved: u32,
}

impl PeerGroup {
    /// Bytes of the struct.
    pub const BYTES: usize = size_of::<Self>();

    /// The struct as a kernel's argument.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let longs =
            [self.abort_word, self.status_word, self.limit_ns, self.inbox, self.gather, self.staging, self.scatter];
        let words = [
            self.rank,
            self.world_size,
            self.rows,
            self.row_bytes,
            self.gather_bytes,
            self.staging_bytes,
            self.scatter_bytes,
            self.reserved,
        ];
        let longs = self.base.iter().chain(&longs).flat_map(|long| long.to_ne_bytes());
        let all = longs.chain(words.into_iter().flat_map(u32::to_ne_bytes));
        let mut bytes = [0; Self::BYTES];
        bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        bytes
    }
}

/// The record of the first wait that a kernel gave up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerFailure {
    /// Whether the host asked for it; otherwise the limit passed.
    pub aborted: bool,
    /// The kernel that waited.
    pub kernel: &'static str,
    /// The rank that waited.
    pub rank: u32,
    /// The rank that did not come.
    pub peer: u32,
    /// The row, or the block, that waited.
    pub place: u32,
}

impl PeerFailure {
    /// Reads the status word; nothing is wrong if it is zero.
    pub fn from_status(status: u64) -> Option<Self> {
        let byte = |index: u32| (status >> (8 * index)) as u8;
        let kernel = match byte(1) {
            1 => "peer_reduce_add_norm",
            2 => "peer_all_reduce_pull",
            3 => "peer_all_reduce_two_shot",
            4 => "peer_all_gather",
            5 => "peer_all_gather_staged",
            _ => "a newer kernel",
        };
        (status != 0).then(|| Self {
            aborted: byte(0) == 2,
            kernel,
            rank: byte(2).into(),
            peer: byte(3).into(),
            place: (status >> 32) as u32,
        })
    }
}

impl fmt::Display for PeerFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kernel, rank, peer, place, .. } = self;
        let why = if self.aborted { "was aborted while it waited" } else { "waited too long" };
        write!(f, "{kernel} on rank {rank} {why} for rank {peer} (row or block {place})")
    }
}

impl std::error::Error for PeerFailure {}

/// What cannot be laid out or planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerPlanError {
    /// A group that peer memory does not serve.
    WorldSize {
        /// Its size.
        world_size: u32,
    },
    /// More rows than have sequence numbers, or none.
    Rows {
        /// How many.
        rows: u32,
    },
    /// A region whose size does not fit its field.
    Region {
        /// The size.
        bytes: u64,
    },
    /// Buffers or rank that do not fit the group.
    Ranks {
        /// The rank.
        rank: u32,
        /// How many buffers were given.
        buffers: usize,
        /// The group's size.
        world_size: u32,
    },
    /// A table that does not say one thing for each size.
    Table {
        /// Of which op.
        op: PeerOp,
    },
}

impl fmt::Display for PeerPlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WorldSize { world_size } => write!(f, "peer memory joins 2 to {WORLD_MAX} ranks, not {world_size}"),
            Self::Rows { rows } => write!(f, "a fused reduction takes 1 to {ROWS_MAX} rows, not {rows}"),
            Self::Region { bytes } => write!(f, "a region of {bytes} bytes does not fit"),
            Self::Ranks { rank, buffers, world_size } => {
                write!(f, "rank {rank} with {buffers} buffers in a group of {world_size}")
            }
            Self::Table { op } => write!(f, "the rules for {op:?} do not cover all sizes in order"),
        }
    }
}

impl std::error::Error for PeerPlanError {}

fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(256)
}

fn rounded(bytes: u32, to: u32) -> Result<u32, PeerPlanError> {
    let none = PeerPlanError::Region { bytes: u64::from(bytes) };
    bytes.max(1).checked_next_multiple_of(to).ok_or(none)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PeerLimits = PeerLimits {
        world_size: 3,
        rows_max: 64,
        row_bytes_max: 8192,
        gather_bytes_max: 1000,
        staging_bytes_max: 1 << 20,
        scatter_bytes_max: 4 << 20,
    };

    fn layout() -> PeerLayout {
        PeerLayout::new(LIMITS).expect("limits that fit")
    }

    #[test]
    fn the_argument_has_the_layout_of_the_device_code() {
        use std::mem::offset_of;
        assert_eq!(size_of::<PeerGroup>(), 152);
        let offsets = [offset_of!(PeerGroup, limit_ns), offset_of!(PeerGroup, inbox), offset_of!(PeerGroup, rank)];
        assert_eq!(offsets, [80, 88, 120]);
        let host = HostWords { abort: 1, status: 2, limit_ns: 3 };
        let bytes = layout().group(1, &[7, 8, 9], host).expect("three ranks").to_bytes();
        assert_eq!((bytes[0], bytes[16], bytes[64], bytes[72], bytes[80]), (7, 9, 1, 2, 3));
        assert_eq!((bytes[120], bytes[124], bytes[128]), (1, 3, 64));
        let code = include_str!("../../cuda/peer.cuh");
        for line in [
            format!("constexpr u64 kControlBytes = {CONTROL_BYTES};"),
            format!("constexpr u32 kWorldMax = {WORLD_MAX};"),
            format!("constexpr u32 kBlocksMax = {BLOCKS_MAX};"),
            format!("constexpr u32 kRowsMax = {ROWS_MAX};"),
        ] {
            assert!(code.contains(&line), "peer.cuh has no `{line}`");
        }
    }

    #[test]
    fn regions_lie_one_behind_the_other_and_are_rounded_for_the_kernels() {
        let layout = layout();
        let limits = layout.limits();
        assert_eq!(limits.gather_bytes_max, 1008);
        assert_eq!((limits.staging_bytes_max % 48, limits.scatter_bytes_max % 48), (0, 0));
        let ends = [
            (layout.inbox + 2 * 64 * 3 * 8192, layout.gather),
            (layout.gather + 2 * 3 * 2 * 1008, layout.staging),
            (layout.staging + 2 * u64::from(limits.staging_bytes_max), layout.scatter),
            (layout.scatter + 4 * u64::from(limits.scatter_bytes_max), layout.bytes()),
        ];
        for (end, next) in ends {
            assert!(end <= next && next < end + 256 && next.is_multiple_of(256), "{end} {next}");
        }
        let host = HostWords { abort: 1, status: 2, limit_ns: 3 };
        assert!(layout.group(2, &[1, 2, 3], host).is_ok());
        assert!(layout.group(3, &[1, 2, 3], host).is_err());
        assert!(layout.group(0, &[1, 2], host).is_err());
    }

    #[test]
    fn impossible_limits_are_refused() {
        let check = |limits, expected| assert_eq!(PeerLayout::new(limits), Err(expected));
        check(PeerLimits { world_size: 1, ..LIMITS }, PeerPlanError::WorldSize { world_size: 1 });
        check(PeerLimits { world_size: 9, ..LIMITS }, PeerPlanError::WorldSize { world_size: 9 });
        check(PeerLimits { rows_max: 8193, ..LIMITS }, PeerPlanError::Rows { rows: 8193 });
        check(PeerLimits { staging_bytes_max: u32::MAX, ..LIMITS }, PeerPlanError::Region { bytes: u32::MAX.into() });
    }

    #[test]
    fn a_status_word_names_who_waited_for_whom() {
        assert_eq!(PeerFailure::from_status(0), None);
        let said = |status| PeerFailure::from_status(status).map(|failure| failure.to_string());
        let expected = "peer_all_reduce_two_shot on rank 2 waited too long for rank 5 (row or block 9)";
        assert_eq!(said(9 << 32 | 5 << 24 | 2 << 16 | 3 << 8 | 1).as_deref(), Some(expected));
        assert!(said(1 << 8 | 2).is_some_and(|text| text.contains("was aborted")));
    }
}
