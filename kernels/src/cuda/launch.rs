//! Launching kernels.
//!
//! Owns the packing of a launch: sizes, attributes, arguments. Nothing is allocated on the way.
//!
//! **Invariant:** a launch whose arguments do not match its kernel in number and size is refused before the driver sees
//! it, where the driver can tell what the kernel takes (CUDA 12.4).

use std::ffi::c_void;
use std::ptr::{null, null_mut};

use super::driver::{LAUNCH_CLUSTER, LAUNCH_COOPERATIVE, LAUNCH_DEPENDENT, LaunchAttribute, RawLaunch, SUCCESS};
use super::error::CudaError;
use super::memory::{DeviceMemory, PeerMemory, PinnedMemory, Span};
use super::module::Kernel;
use super::stream::Stream;

/// Most arguments that a kernel of ours takes.
pub const ARGS_MAX: usize = 48;

/// Sizes and manner of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaunchConfig {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// May begin before the kernel before it has ended (programmatic dependent launch): the kernel waits itself.
    pub dependent: bool,
    /// All blocks run at the same time, or the launch is refused.
    pub cooperative: bool,
    /// Blocks of a cluster; the grid is a multiple of it.
    pub cluster: Option<[u32; 3]>,
}

impl LaunchConfig {
    /// A plain launch.
    pub fn new(grid: [u32; 3], block: [u32; 3]) -> Self {
        Self { grid, block, shared_bytes: 0, dependent: false, cooperative: false, cluster: None }
    }

    /// A plain launch in one dimension.
    pub fn linear(num_blocks: u32, num_threads: u32) -> Self {
        Self::new([num_blocks, 1, 1], [num_threads, 1, 1])
    }

    /// With dynamic shared memory.
    pub fn shared(self, shared_bytes: u32) -> Self {
        Self { shared_bytes, ..self }
    }

    /// As a programmatic dependent launch.
    pub fn dependent(self) -> Self {
        Self { dependent: true, ..self }
    }

    /// With clusters.
    pub fn cluster(self, cluster: [u32; 3]) -> Self {
        Self { cluster: Some(cluster), ..self }
    }

    /// As a cooperative launch.
    pub fn cooperative(self) -> Self {
        Self { cooperative: true, ..self }
    }

    /// Threads of a block.
    pub fn num_threads(&self) -> u64 {
        product(self.block)
    }

    /// Says what the driver would only call an invalid value.
    fn check(&self) -> Result<(), String> {
        let cluster = self.cluster.unwrap_or([1; 3]);
        if product(self.grid) == 0 || self.num_threads() == 0 || product(cluster) == 0 {
            return Err(format!(
                "grid {:?}, block {:?}, cluster {cluster:?}: nothing to launch",
                self.grid, self.block
            ));
        }
        if self.grid.iter().zip(cluster).any(|(blocks, part)| blocks % part != 0) {
            return Err(format!("grid {:?} is no multiple of cluster {cluster:?}", self.grid));
        }
        Ok(())
    }

    /// The driver's attributes, and how many of them count.
    pub(super) fn attributes(&self) -> ([LaunchAttribute; 3], u32) {
        let mut list = [LaunchAttribute { id: 0, padding: 0, value: [0; 8] }; 3];
        let mut count = 0;
        let mut push = |id, value: [u32; 3]| {
            let words = [u64::from(value[0]) | u64::from(value[1]) << 32, u64::from(value[2])];
            list[count].id = id;
            list[count].value[..2].copy_from_slice(&words);
            count += 1;
        };
        if let Some(cluster) = self.cluster {
            push(LAUNCH_CLUSTER, cluster);
        }
        if self.dependent {
            push(LAUNCH_DEPENDENT, [1, 0, 0]);
        }
        if self.cooperative {
            push(LAUNCH_COOPERATIVE, [1, 0, 0]);
        }
        (list, count as u32)
    }
}

fn product(sizes: [u32; 3]) -> u64 {
    sizes.iter().map(|size| u64::from(*size)).product()
}

/// One argument of a kernel, by value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelArg<'a> {
    /// 32 bits: `u32`, `i32`, `float`.
    Word(u32),
    /// 64 bits: pointers, `u64`.
    Long(u64),
    /// A struct, as its bytes.
    Bytes(&'a [u8]),
}

impl KernelArg<'_> {
    fn size(&self) -> usize {
        match self {
            Self::Word(_) => 4,
            Self::Long(_) => 8,
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    fn as_ptr(&self) -> *const c_void {
        match self {
            Self::Word(word) => (&raw const *word).cast(),
            Self::Long(long) => (&raw const *long).cast(),
            Self::Bytes(bytes) => bytes.as_ptr().cast(),
        }
    }
}

macro_rules! arg_from {
    ($($ty:ty => |$value:ident| $arg:expr;)*) => {
        $(impl From<$ty> for KernelArg<'_> {
            fn from($value: $ty) -> Self {
                $arg
            }
        })*
    };
}
arg_from! {
    u32 => |value| Self::Word(value);
    i32 => |value| Self::Word(value.cast_unsigned());
    f32 => |value| Self::Word(value.to_bits());
    u64 => |value| Self::Long(value);
    Span => |value| Self::Long(value.address());
    Option<Span> => |value| Self::Long(value.map_or(0, |span| span.address()));
    &DeviceMemory => |value| Self::Long(value.address());
    &PeerMemory => |value| Self::Long(value.address());
    &PinnedMemory => |value| Self::Long(value.span().address());
}

impl<'a> From<&'a [u8]> for KernelArg<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self::Bytes(bytes)
    }
}

/// Arguments of a kernel: pointers (`Span`, `&DeviceMemory`, `Option<Span>`), `u32`, `i32`, `u64`, `f32`, or bytes of a struct.
#[macro_export]
macro_rules! kernel_args {
    ($($arg:expr),* $(,)?) => { &[$($crate::cuda::KernelArg::from($arg)),*] };
}

impl Stream {
    /// Puts a kernel into the stream.
    ///
    /// # Safety
    /// Every address among the arguments leads to live memory, large enough for what the kernel does with it, until the
    /// launch has ended; host memory that the kernel touches is not borrowed meanwhile.
    ///
    /// # Errors
    /// Sizes or arguments that do not fit the kernel, or a device that is lost. Faults inside the kernel come later.
    pub unsafe fn launch(
        &self,
        kernel: &Kernel,
        config: &LaunchConfig,
        args: &[KernelArg<'_>],
    ) -> Result<(), CudaError> {
        let refuse = |reason| CudaError::refused("launch", format!("{}: {reason}", kernel.name()));
        config.check().map_err(refuse)?;
        check_args(kernel.parameters(), args).map_err(refuse)?;
        kernel.prepare(config)?;
        let mut pointers = [null(); ARGS_MAX];
        for (pointer, arg) in pointers.iter_mut().zip(args) {
            *pointer = arg.as_ptr();
        }
        let (attributes, num_attributes) = config.attributes();
        let raw = RawLaunch {
            grid: config.grid,
            block: config.block,
            shared_bytes: config.shared_bytes,
            stream: self.handle(),
            attributes: attributes.as_ptr(),
            num_attributes,
        };
        self.context().bind()?;
        // SAFETY: all structs are those of the header and live through the call; the caller answers for the arguments.
        let code =
            unsafe { (self.context().driver().launch)(&raw const raw, kernel.handle(), pointers.as_ptr(), null_mut()) };
        if code != SUCCESS {
            return Err(self.context().error("cuLaunchKernelEx", code, Some(kernel.name())));
        }
        self.context().note_launch(kernel.shared_name());
        Ok(())
    }
}

/// `parameters`: the sizes that the kernel takes, where they are known.
fn check_args(parameters: Option<&[usize]>, args: &[KernelArg<'_>]) -> Result<(), String> {
    if args.len() > ARGS_MAX {
        return Err(format!("{} arguments, at most {ARGS_MAX} can be passed", args.len()));
    }
    let Some(parameters) = parameters else { return Ok(()) };
    if parameters.len() == args.len() && parameters.iter().zip(args).all(|(size, arg)| *size == arg.size()) {
        return Ok(());
    }
    let given: Vec<usize> = args.iter().map(KernelArg::size).collect();
    Err(format!("it takes arguments of {parameters:?} bytes, given are {given:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_packed_as_the_driver_reads_them() {
        assert_eq!(LaunchConfig::linear(3, 64).attributes().1, 0);
        let (list, count) = LaunchConfig::linear(4, 64).cluster([2, 1, 1]).dependent().attributes();
        assert_eq!(count, 2);
        assert_eq!((list[0].id, &list[0].value[..2]), (LAUNCH_CLUSTER, [2 | 1 << 32, 1].as_slice()));
        assert_eq!((list[1].id, &list[1].value[..2]), (LAUNCH_DEPENDENT, [1, 0].as_slice()));
    }

    #[test]
    fn a_launch_that_cannot_be_is_said_in_words() {
        assert!(LaunchConfig::linear(0, 64).check().is_err());
        assert!(LaunchConfig::linear(3, 64).cluster([2, 1, 1]).check().unwrap_err().contains("no multiple"));
        assert!(LaunchConfig::linear(4, 64).cluster([2, 1, 1]).check().is_ok());
    }

    #[test]
    fn arguments_are_checked_by_number_and_size() {
        let args: &[KernelArg<'_>] = kernel_args![7_u64, 3_u32, 1.5_f32];
        assert_eq!(args, [KernelArg::Long(7), KernelArg::Word(3), KernelArg::Word(1.5_f32.to_bits())]);
        assert!(check_args(None, args).is_ok());
        assert!(check_args(Some(&[8, 4, 4]), args).is_ok());
        assert!(check_args(Some(&[8, 4]), args).is_err());
        let words = check_args(Some(&[8, 8, 4]), args).unwrap_err();
        assert_eq!(words, "it takes arguments of [8, 8, 4] bytes, given are [8, 4, 4]");
    }
}
