//! Matrix products of many rows, by cuBLASLt.
//!
//! Owns the library's table, its handle, its workspace and the algorithms that were settled for each shape.
//!
//! All products are `y[rows, n] = x[rows, k] w[n, k]^T`, row-major. The library thinks in columns: there the same bytes are
//! `y^T[n, rows] = w[n, k] x^T[k, rows]`, its first operand is `w` transposed, its second `x` as it lies.
//!
//! **Invariant:** sums are formed in f32 and, for f32 operands, of f32 products (never TF32); partial sums of a split
//! product are added in f32 in a fixed order, so that the same plan gives the same bits; nothing is allocated or asked
//! once a plan exists, so that a product may be recorded.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr::{null, null_mut};
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::Duration;

use super::context::Context;
use super::error::CudaError;
use super::library::{FoundLibrary, Library, LibraryReport, function_table};
use super::memory::{DeviceMemory, Span};
use super::stream::{Event, Stream};

/// Name in reports.
const NAME: &str = "cuBLASLt";
/// Workspace that algorithms may use: what the vendor advises for Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms that `tune` compares at most.
const CANDIDATES_MAX: usize = 16;
/// Products of one measurement.
const TUNE_RUNS: usize = 8;
/// Measurements of one candidate; the middle one counts.
const TUNE_SAMPLES: usize = 3;

const COMPUTE_F32: c_int = 68;
const ATTRIBUTE_TRANSPOSE_A: c_int = 3;
const ATTRIBUTE_EPILOGUE: c_int = 7;
const ATTRIBUTE_BIAS: c_int = 8;
const TRANSPOSED: i32 = 1;
const EPILOGUE_BIAS: u32 = 4;
const PREFERENCE_WORKSPACE: c_int = 1;
const PREFERENCE_REDUCTION: c_int = 3;
/// Split products add in the compute type, in workspace; adding in the output's type would round more than once.
const REDUCTION_IN_F32: u32 = 2;
const NOT_SUPPORTED: c_int = 15;

type Handle = *mut c_void;

/// `cublasLtMatmulAlgo_t`: the library's own notes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    algorithm: Algorithm,
    workspace_bytes: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

const NO_CANDIDATE: Candidate =
    Candidate { algorithm: Algorithm([0; 8]), workspace_bytes: 0, state: 0, waves: 0.0, reserved: [0; 4] };

function_table! {
    /// The library.
    Lt {
        version = c"cublasLtGetVersion"() -> usize;
        create = c"cublasLtCreate"(*mut Handle) -> c_int;
        destroy = c"cublasLtDestroy"(Handle) -> c_int;
        desc_create = c"cublasLtMatmulDescCreate"(*mut Handle, c_int, c_int) -> c_int;
        desc_set = c"cublasLtMatmulDescSetAttribute"(Handle, c_int, *const c_void, usize) -> c_int;
        desc_destroy = c"cublasLtMatmulDescDestroy"(Handle) -> c_int;
        layout_create = c"cublasLtMatrixLayoutCreate"(*mut Handle, c_int, u64, u64, i64) -> c_int;
        layout_destroy = c"cublasLtMatrixLayoutDestroy"(Handle) -> c_int;
        preference_create = c"cublasLtMatmulPreferenceCreate"(*mut Handle) -> c_int;
        preference_set = c"cublasLtMatmulPreferenceSetAttribute"(Handle, c_int, *const c_void, usize) -> c_int;
        preference_destroy = c"cublasLtMatmulPreferenceDestroy"(Handle) -> c_int;
        heuristic = c"cublasLtMatmulAlgoGetHeuristic"(
            Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Candidate, *mut c_int,
        ) -> c_int;
        matmul = c"cublasLtMatmul"(
            Handle, Handle, *const c_void, *const c_void, Handle, *const c_void, Handle, *const c_void, *const c_void,
            Handle, *mut c_void, Handle, *const Algorithm, *mut c_void, usize, Handle,
        ) -> c_int;
    }
    optional {}
}

impl Lt {
    fn open() -> Result<&'static Self, CudaError> {
        static LT: OnceLock<Result<Lt, CudaError>> = OnceLock::new();
        let open = || Self::load(&Library::open(NAME, &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"])?);
        LT.get_or_init(open).as_ref().map_err(Clone::clone)
    }
}

pub(super) fn report() -> LibraryReport {
    let found = Lt::open().map(|lt| {
        // SAFETY: takes nothing, gives a number.
        let version = unsafe { (lt.version)() };
        FoundLibrary { path: lt.path.clone(), version: version_text(version) }
    });
    let purpose = "matrix products of many rows";
    LibraryReport { name: NAME, purpose, found: found.map_err(|error| error.to_string()) }
}

/// `130100` as `13.1.0`.
fn version_text(version: usize) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

/// Type of an operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scalar {
    /// 32-bit float.
    F32,
    /// 16-bit float of IEEE.
    F16,
    /// The upper half of a 32-bit float.
    Bf16,
}

impl Scalar {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// `cudaDataType`.
    fn code(self) -> c_int {
        match self {
            Self::F32 => 0,
            Self::F16 => 2,
            Self::Bf16 => 14,
        }
    }
}

/// What a product looks like; each has one plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatmulShape {
    /// Rows of `x` and `y`: the token bucket.
    pub rows: usize,
    /// Columns of `y`, rows of `w`.
    pub n: usize,
    /// Columns of `x` and `w`.
    pub k: usize,
    /// Type of `x` and `w`.
    pub input: Scalar,
    /// Type of `y`: that of `x`, or f32.
    pub output: Scalar,
    /// A bias `[n]` of the output's type is added.
    pub has_bias: bool,
}

/// Operands of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatmulOperands {
    /// `[rows, k]`.
    pub x: Span,
    /// `[n, k]`.
    pub w: Span,
    /// `[n]`, where the shape has one.
    pub bias: Option<Span>,
    /// `[rows, n]`.
    pub y: Span,
    /// `y` is added to instead of written.
    pub accumulate: bool,
}

/// A shape with its settled algorithm.
#[derive(Debug)]
pub struct MatmulPlan {
    shape: MatmulShape,
    lt: &'static Lt,
    desc: Handle,
    /// Of `w`, `x` and `y`.
    layouts: [Handle; 3],
    algorithm: Cell<Algorithm>,
    workspace_bytes: Cell<usize>,
}

impl std::fmt::Debug for Lt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lt").field(&self.path).finish()
    }
}

/// The library on one device, for one stream: products share its workspace, so they run one after the other.
#[derive(Debug)]
pub struct BlasLt {
    context: Context,
    lt: &'static Lt,
    handle: Handle,
    workspace: DeviceMemory,
    plans: RefCell<HashMap<MatmulShape, Rc<MatmulPlan>>>,
}

impl BlasLt {
    /// Opens the library and allocates the workspace.
    ///
    /// # Errors
    /// No library, or no memory.
    pub fn new(context: &Context) -> Result<Self, CudaError> {
        let lt = Lt::open()?;
        context.bind()?;
        let workspace = DeviceMemory::alloc(context, WORKSPACE_BYTES)?;
        let mut handle = null_mut();
        // SAFETY: writes one handle; the context is current.
        check(context, "cublasLtCreate", unsafe { (lt.create)(&raw mut handle) })?;
        Ok(Self { context: context.clone(), lt, handle, workspace, plans: RefCell::default() })
    }

    /// The plan of a shape; made once, at warm-up.
    ///
    /// # Errors
    /// The library has no algorithm for it.
    pub fn plan(&self, shape: MatmulShape) -> Result<Rc<MatmulPlan>, CudaError> {
        if let Some(plan) = self.plans.borrow().get(&shape) {
            return Ok(Rc::clone(plan));
        }
        let plan = MatmulPlan::new(&self.context, self.lt, shape)?;
        if shape.has_bias {
            // Only its alignment counts until the first product.
            plan.set(&self.context, ATTRIBUTE_BIAS, &self.workspace.address())?;
        }
        let best = self.candidates(&plan, 1)?[0];
        plan.settle(&best);
        let plan = Rc::new(plan);
        self.plans.borrow_mut().insert(shape, Rc::clone(&plan));
        Ok(plan)
    }

    /// Puts a product into the stream.
    ///
    /// # Errors
    /// Operands that do not fit the shape, or a device that is lost.
    pub fn matmul(&self, stream: &Stream, plan: &MatmulPlan, operands: &MatmulOperands) -> Result<(), CudaError> {
        plan.check(operands)?;
        self.run(stream, plan, operands, plan.algorithm.get(), plan.workspace_bytes.get())
    }

    /// Runs the library's best algorithms for a shape and keeps the fastest; gives the time of one product with it.
    ///
    /// Operands are taken in turn: many weights, as a model has layers, so that the cache holds none of them.
    ///
    /// # Errors
    /// No operands, none that fits, or a passed deadline.
    pub fn tune(
        &self,
        stream: &Stream,
        shape: MatmulShape,
        operands: &[MatmulOperands],
        deadline: Duration,
    ) -> Result<Duration, CudaError> {
        let plan = self.plan(shape)?;
        operands.iter().try_for_each(|operands| plan.check(operands))?;
        let mut best: Option<(Duration, Candidate)> = None;
        for candidate in self.candidates(&plan, CANDIDATES_MAX)? {
            let Some(time) = self.time(stream, &plan, operands, &candidate, deadline)? else { continue };
            if best.as_ref().is_none_or(|(fastest, _)| time < *fastest) {
                best = Some((time, candidate));
            }
        }
        let (time, candidate) = best.ok_or_else(|| CudaError::refused("tune", "nothing could be measured"))?;
        plan.settle(&candidate);
        Ok(time)
    }

    /// Middle of some measurements; nothing where the algorithm does not run after all.
    fn time(
        &self,
        stream: &Stream,
        plan: &MatmulPlan,
        operands: &[MatmulOperands],
        candidate: &Candidate,
        deadline: Duration,
    ) -> Result<Option<Duration>, CudaError> {
        let (from, to) = (Event::timing(&self.context)?, Event::timing(&self.context)?);
        let mut times = Vec::with_capacity(TUNE_SAMPLES);
        // The first one loads the kernel and does not count.
        for sample in 0..=TUNE_SAMPLES {
            from.record(stream)?;
            for operands in operands.iter().cycle().take(TUNE_RUNS) {
                match self.run(stream, plan, operands, candidate.algorithm, candidate.workspace_bytes) {
                    Err(error) if error.code() == Some(NOT_SUPPORTED) => return Ok(None),
                    other => other?,
                }
            }
            to.record(stream)?;
            to.wait(deadline, "a measurement of matrix products")?;
            if sample > 0 {
                times.push(to.since(&from)? / TUNE_RUNS as u32);
            }
        }
        times.sort();
        Ok(times.get(times.len() / 2).copied().filter(|_| !operands.is_empty()))
    }

    fn run(
        &self,
        stream: &Stream,
        plan: &MatmulPlan,
        operands: &MatmulOperands,
        algorithm: Algorithm,
        workspace_bytes: usize,
    ) -> Result<(), CudaError> {
        self.context.bind()?;
        if let Some(bias) = operands.bias {
            let address = bias.address();
            plan.set(&self.context, ATTRIBUTE_BIAS, &address)?;
        }
        let (alpha, beta) = (1.0_f32, if operands.accumulate { 1.0_f32 } else { 0.0 });
        let [w, x, y] = plan.layouts;
        // SAFETY: all handles are live and made for these shapes; the spans were checked against the shape; alpha and beta
        // are read before the call returns, also while recording.
        let code = unsafe {
            (self.lt.matmul)(
                self.handle,
                plan.desc,
                (&raw const alpha).cast(),
                pointer(operands.w),
                w,
                pointer(operands.x),
                x,
                (&raw const beta).cast(),
                pointer(operands.y),
                y,
                pointer(operands.y).cast_mut(),
                y,
                &raw const algorithm,
                pointer(self.workspace.span()).cast_mut(),
                workspace_bytes,
                stream.as_raw(),
            )
        };
        check(&self.context, "cublasLtMatmul", code)
    }

    /// At least one, best first.
    fn candidates(&self, plan: &MatmulPlan, count: usize) -> Result<Vec<Candidate>, CudaError> {
        self.context.bind()?;
        let preference = Preference::new(&self.context, self.lt, self.workspace.len())?;
        let mut list = vec![NO_CANDIDATE; count];
        let mut found: c_int = 0;
        let [w, x, y] = plan.layouts;
        // SAFETY: all handles are live; at most as many results are written as there is room for.
        let code = unsafe {
            (self.lt.heuristic)(
                self.handle,
                plan.desc,
                w,
                x,
                y,
                y,
                preference.handle,
                count as c_int,
                list.as_mut_ptr(),
                &raw mut found,
            )
        };
        check(&self.context, "cublasLtMatmulAlgoGetHeuristic", code)?;
        list.truncate(usize::try_from(found).unwrap_or(0));
        list.retain(|candidate| candidate.state == 0 && candidate.workspace_bytes <= self.workspace.len());
        if list.is_empty() {
            return Err(CudaError::refused("matmul", format!("cuBLASLt has no algorithm for {:?}", plan.shape)));
        }
        Ok(list)
    }
}

impl Drop for BlasLt {
    fn drop(&mut self) {
        self.plans.borrow_mut().clear();
        if self.context.bind().is_ok() {
            // SAFETY: created in `new`, destroyed once.
            unsafe { (self.lt.destroy)(self.handle) };
        }
    }
}

impl MatmulPlan {
    fn new(context: &Context, lt: &'static Lt, shape: MatmulShape) -> Result<Self, CudaError> {
        if shape.rows == 0 || shape.n == 0 || shape.k == 0 {
            return Err(CudaError::refused("matmul", format!("{shape:?} is empty")));
        }
        let nothing = Algorithm([0; 8]);
        // Handles are filled in one by one; those that are still null are not destroyed.
        let mut plan = Self {
            shape,
            lt,
            desc: null_mut(),
            layouts: [null_mut(); 3],
            algorithm: Cell::new(nothing),
            workspace_bytes: Cell::new(0),
        };
        // SAFETY: writes one handle.
        let code = unsafe { (lt.desc_create)(&raw mut plan.desc, COMPUTE_F32, Scalar::F32.code()) };
        check(context, "cublasLtMatmulDescCreate", code)?;
        plan.set(context, ATTRIBUTE_TRANSPOSE_A, &TRANSPOSED)?;
        if shape.has_bias {
            plan.set(context, ATTRIBUTE_EPILOGUE, &EPILOGUE_BIAS)?;
        }
        let sizes =
            [(shape.input, shape.k, shape.n), (shape.input, shape.k, shape.rows), (shape.output, shape.n, shape.rows)];
        for (layout, (scalar, rows, columns)) in plan.layouts.iter_mut().zip(sizes) {
            // SAFETY: writes one handle.
            let code = unsafe { (lt.layout_create)(layout, scalar.code(), rows as u64, columns as u64, rows as i64) };
            check(context, "cublasLtMatrixLayoutCreate", code)?;
        }
        Ok(plan)
    }

    /// The shape.
    pub fn shape(&self) -> MatmulShape {
        self.shape
    }

    fn settle(&self, candidate: &Candidate) {
        self.algorithm.set(candidate.algorithm);
        self.workspace_bytes.set(candidate.workspace_bytes);
    }

    fn set<T: Copy>(&self, context: &Context, attribute: c_int, value: &T) -> Result<(), CudaError> {
        // SAFETY: reads the value, whose size is given.
        let code =
            unsafe { (self.lt.desc_set)(self.desc, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) };
        check(context, "cublasLtMatmulDescSetAttribute", code)
    }

    fn check(&self, operands: &MatmulOperands) -> Result<(), CudaError> {
        let MatmulShape { rows, n, k, input, output, has_bias } = self.shape;
        let needs = [
            ("x", operands.x.len(), rows * k * input.bytes()),
            ("w", operands.w.len(), n * k * input.bytes()),
            ("y", operands.y.len(), rows * n * output.bytes()),
            ("bias", operands.bias.map_or(0, |bias| bias.len()), if has_bias { n * output.bytes() } else { 0 }),
        ];
        for (name, has, needs) in needs {
            if has < needs {
                let reason = format!("{name} has {has} bytes, {:?} needs {needs}", self.shape);
                return Err(CudaError::refused("matmul", reason));
            }
        }
        if operands.bias.is_some() != has_bias {
            return Err(CudaError::refused(
                "matmul",
                "a bias is given that the shape does not have, or the other way round",
            ));
        }
        Ok(())
    }
}

impl Drop for MatmulPlan {
    fn drop(&mut self) {
        for layout in self.layouts.into_iter().filter(|layout| !layout.is_null()) {
            // SAFETY: created in `new`, destroyed once.
            unsafe { (self.lt.layout_destroy)(layout) };
        }
        if !self.desc.is_null() {
            // SAFETY: as above.
            unsafe { (self.lt.desc_destroy)(self.desc) };
        }
    }
}

/// What algorithms are asked for.
struct Preference {
    lt: &'static Lt,
    handle: Handle,
}

impl Preference {
    fn new(context: &Context, lt: &'static Lt, workspace_bytes: usize) -> Result<Self, CudaError> {
        let mut handle = null_mut();
        // SAFETY: writes one handle.
        check(context, "cublasLtMatmulPreferenceCreate", unsafe { (lt.preference_create)(&raw mut handle) })?;
        let preference = Self { lt, handle };
        let set = |attribute, value: *const c_void, size| {
            // SAFETY: reads `size` bytes of the value.
            let code = unsafe { (lt.preference_set)(handle, attribute, value, size) };
            check(context, "cublasLtMatmulPreferenceSetAttribute", code)
        };
        set(PREFERENCE_WORKSPACE, (&raw const workspace_bytes).cast(), size_of::<usize>())?;
        let reduction: c_uint = REDUCTION_IN_F32;
        set(PREFERENCE_REDUCTION, (&raw const reduction).cast(), size_of::<c_uint>())?;
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        unsafe { (self.lt.preference_destroy)(self.handle) };
    }
}

/// The address as the library takes it.
fn pointer(span: Span) -> *const c_void {
    if span.is_empty() { null() } else { std::ptr::with_exposed_provenance(span.address() as usize) }
}

fn check(context: &Context, call: &'static str, code: c_int) -> Result<(), CudaError> {
    if code == 0 {
        return Ok(());
    }
    let device = Some(context.ordinal());
    Err(CudaError::Call { call, code, name: name_of(code).into(), device, kernel: context.last_launch() })
}

fn name_of(code: c_int) -> &'static str {
    match code {
        1 => "CUBLAS_STATUS_NOT_INITIALIZED",
        3 => "CUBLAS_STATUS_ALLOC_FAILED",
        7 => "CUBLAS_STATUS_INVALID_VALUE",
        8 => "CUBLAS_STATUS_ARCH_MISMATCH",
        11 => "CUBLAS_STATUS_MAPPING_ERROR",
        13 => "CUBLAS_STATUS_EXECUTION_FAILED",
        14 => "CUBLAS_STATUS_INTERNAL_ERROR",
        15 => "CUBLAS_STATUS_NOT_SUPPORTED",
        16 => "CUBLAS_STATUS_LICENSE_ERROR",
        _ => "a code of cuBLAS",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_have_the_sizes_of_the_header() {
        assert_eq!(size_of::<Algorithm>(), 64);
        assert_eq!(size_of::<Candidate>(), 96);
        assert_eq!(std::mem::offset_of!(Candidate, state), 72);
    }

    #[test]
    fn a_version_reads_as_the_vendor_writes_it() {
        assert_eq!(version_text(130_100), "13.1.0");
        assert_eq!(version_text(120_805), "12.8.5");
    }
}
