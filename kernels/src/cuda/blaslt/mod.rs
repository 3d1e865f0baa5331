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

mod library;
mod plan;

pub(super) use library::report;
pub use plan::{MatmulOperands, MatmulPlan, MatmulShape, Scalar};

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr::{null, null_mut};
use std::rc::Rc;
use std::time::Duration;

use super::context::Context;
use super::error::CudaError;
use super::event::Event;
use super::memory::{DeviceMemory, Span};
use super::stream::Stream;
use library::{Algorithm, Candidate, Handle, Lt, NO_CANDIDATE, NOT_SUPPORTED, Preference, check};

/// Workspace that algorithms may use: what the vendor advises for Hopper.
pub const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms that `tune` compares at most.
const CANDIDATES_MAX: usize = 16;
/// Products of one measurement.
const TUNE_RUNS: usize = 8;
/// Measurements of one candidate; the middle one counts.
const TUNE_SAMPLES: usize = 3;

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
            plan.set_bias(&self.context, self.workspace.address())?;
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
            plan.set_bias(&self.context, bias.address())?;
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

/// The address as the library takes it.
fn pointer(span: Span) -> *const c_void {
    if span.is_empty() { null() } else { std::ptr::with_exposed_provenance(span.address() as usize) }
}
