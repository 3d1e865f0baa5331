//! Sixteen f32 lanes, on AVX-512, AVX2 or plain Rust, chosen at run time.
//!
//! A kernel is written once, over [`Lanes`], and [`Simd::run`] compiles it for each instruction set. The type that stands for
//! an instruction set can only be made where the CPU has it, so kernels need no `unsafe` of their own.
//!
//! **Invariant:** every operation gives the same bits on every instruction set; sums over lanes have one order.

use half::f16;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;
/// What a head dim is a multiple of: half a vector.
pub(crate) const HALF: usize = 8;

/// An instruction set, as a kernel sees it. `V` holds sixteen f32.
pub(crate) trait Lanes: Copy {
    /// Sixteen f32.
    type V: Copy;
    /// Whether a vector is one of 32 registers: how much a kernel may keep in them.
    const WIDE: bool = false;
    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; LANES]) -> Self::V;
    /// Eight values; the upper lanes are 0.
    fn load_half(self, x: &[f32; HALF]) -> Self::V;
    fn load_f16(self, x: &[f16; LANES]) -> Self::V;
    /// As `load_half`.
    fn load_f16_half(self, x: &[f16; HALF]) -> Self::V;
    fn store(self, v: Self::V, out: &mut [f32; LANES]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`: `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`: `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `v`, and 0 where `x < bound`.
    fn zero_below(self, x: Self::V, bound: f32, v: Self::V) -> Self::V;
    /// The lowest nine bits of each lane as sign and exponent of a float.
    fn low_bits_as_exponent(self, v: Self::V) -> Self::V;
    /// Sum of the lanes: halves onto each other until one is left.
    fn sum(self, v: Self::V) -> f32;
    /// Largest lane.
    fn max_lane(self, v: Self::V) -> f32;

    /// A zero vector.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }
}

/// Work that [`Simd::run`] compiles for each instruction set. `run` must be `#[inline(always)]`, and so must what it calls.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    fn run<S: Lanes>(self, simd: S) -> Self::Output;
}

/// The instruction sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Simd {
    /// AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    /// Plain Rust.
    Portable,
}

impl Simd {
    /// The widest that this CPU has.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = x86::Avx512::detect() {
                return Self::Avx512(simd);
            }
            if let Some(simd) = x86::Avx2::detect() {
                return Self::Avx2(simd);
            }
        }
        Self::Portable
    }

    /// All that this CPU has.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(x86::Avx2::detect().map(Self::Avx2));
            all.extend(x86::Avx512::detect().map(Self::Avx512));
        }
        all
    }

    /// Runs a kernel on this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.run(kernel),
            Self::Portable => kernel.run(Portable),
        }
    }
}

/// Plain Rust; on ARM the compiler makes NEON of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portable;

/// Applies a function to each lane.
#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for (i, o) in out.iter_mut().enumerate() {
        *o = f(i);
    }
    out
}

impl Lanes for Portable {
    type V = [f32; LANES];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::V {
        *x
    }
    #[inline(always)]
    fn load_half(self, x: &[f32; HALF]) -> Self::V {
        each(|i| if i < HALF { x[i] } else { 0.0 })
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16; LANES]) -> Self::V {
        each(|i| x[i].to_f32())
    }
    #[inline(always)]
    fn load_f16_half(self, x: &[f16; HALF]) -> Self::V {
        each(|i| if i < HALF { x[i].to_f32() } else { 0.0 })
    }
    #[inline(always)]
    fn store(self, v: Self::V, out: &mut [f32; LANES]) {
        *out = v;
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn zero_below(self, x: Self::V, bound: f32, v: Self::V) -> Self::V {
        each(|i| if x[i] < bound { 0.0 } else { v[i] })
    }
    #[inline(always)]
    fn low_bits_as_exponent(self, v: Self::V) -> Self::V {
        each(|i| f32::from_bits(v[i].to_bits() << 23))
    }
    #[inline(always)]
    fn sum(self, mut v: Self::V) -> f32 {
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                v[i] += v[i + half];
            }
        }
        v[0]
    }
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::{HALF, Kernel, LANES, Lanes};

    /// Proof that the CPU has AVX-512F.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Avx512(());

    /// Proof that the CPU has AVX2, FMA and F16C.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Avx2(());

    impl Avx512 {
        pub(super) fn detect() -> Option<Self> {
            (is_x86_feature_detected!("avx512f") && Avx2::detect().is_some()).then_some(Self(()))
        }

        #[inline]
        pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
            #[target_feature(enable = "avx512f,avx2,fma,f16c")]
            fn compiled<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
                kernel.run(simd)
            }
            // SAFETY: `self` exists only where `detect` saw these features.
            unsafe { compiled(self, kernel) }
        }
    }

    impl Avx2 {
        pub(super) fn detect() -> Option<Self> {
            let found = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            (found && is_x86_feature_detected!("f16c")).then_some(Self(()))
        }

        #[inline]
        pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
            #[target_feature(enable = "avx2,fma,f16c")]
            fn compiled<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
                kernel.run(simd)
            }
            // SAFETY: `self` exists only where `detect` saw these features.
            unsafe { compiled(self, kernel) }
        }
    }

    impl Lanes for Avx512 {
        type V = __m512;
        const WIDE: bool = true;

        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: `self` proves AVX-512F (this holds for the whole impl).
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> __m512 {
            // SAFETY: AVX-512F; sixteen values lie behind the reference.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }
        #[inline(always)]
        fn load_half(self, x: &[f32; HALF]) -> __m512 {
            // SAFETY: AVX-512F; eight values lie behind the reference.
            unsafe { _mm512_zextps256_ps512(_mm256_loadu_ps(x.as_ptr())) }
        }
        #[inline(always)]
        fn load_f16(self, x: &[f16; LANES]) -> __m512 {
            // SAFETY: AVX-512F; 32 bytes lie behind the reference.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
        }
        #[inline(always)]
        fn load_f16_half(self, x: &[f16; HALF]) -> __m512 {
            // SAFETY: F16C; 16 bytes lie behind the reference.
            unsafe { _mm512_zextps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast()))) }
        }
        #[inline(always)]
        fn store(self, v: __m512, out: &mut [f32; LANES]) {
            // SAFETY: AVX-512F; sixteen values lie behind the reference.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: AVX-512F.
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: AVX-512F.
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: AVX-512F.
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: AVX-512F.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn min(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: AVX-512F.
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            // SAFETY: AVX-512F.
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        fn zero_below(self, x: __m512, bound: f32, v: __m512) -> __m512 {
            // SAFETY: AVX-512F.
            unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(bound)), v) }
        }
        #[inline(always)]
        fn low_bits_as_exponent(self, v: __m512) -> __m512 {
            // SAFETY: AVX-512F.
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(v))) }
        }
        #[inline(always)]
        fn sum(self, v: __m512) -> f32 {
            let (low, high) = halves(v);
            // SAFETY: AVX2 comes with this token.
            sum_of_eight(unsafe { _mm256_add_ps(low, high) })
        }
        #[inline(always)]
        fn max_lane(self, v: __m512) -> f32 {
            let (low, high) = halves(v);
            // SAFETY: AVX2 comes with this token.
            max_of_eight(unsafe { _mm256_max_ps(low, high) })
        }
    }

    #[inline(always)]
    fn halves(v: __m512) -> (__m256, __m256) {
        // SAFETY: only a CPU with AVX-512F makes a `__m512` here.
        unsafe {
            let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v)));
            (_mm512_castps512_ps256(v), high)
        }
    }

    #[inline(always)]
    fn sum_of_eight(v: __m256) -> f32 {
        // SAFETY: only a CPU with AVX2 makes a `__m256` here.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    fn max_of_eight(v: __m256) -> f32 {
        // SAFETY: only a CPU with AVX2 makes a `__m256` here.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    /// Two halves through one eight-lane instruction.
    macro_rules! both {
        ($op:ident, $($arg:ident),+) => {
            // SAFETY: the token proves AVX2 and FMA.
            unsafe { [$op($($arg[0]),+), $op($($arg[1]),+)] }
        };
    }

    impl Lanes for Avx2 {
        type V = [__m256; 2];

        #[inline(always)]
        fn splat(self, x: f32) -> Self::V {
            // SAFETY: `self` proves AVX2 (this holds for the whole impl).
            unsafe { [_mm256_set1_ps(x); 2] }
        }
        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> Self::V {
            // SAFETY: AVX2; sixteen values lie behind the reference.
            unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(HALF))] }
        }
        #[inline(always)]
        fn load_half(self, x: &[f32; HALF]) -> Self::V {
            // SAFETY: AVX2; eight values lie behind the reference.
            unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_setzero_ps()] }
        }
        #[inline(always)]
        fn load_f16(self, x: &[f16; LANES]) -> Self::V {
            let (low, high) = (x.as_ptr().cast(), x[HALF..].as_ptr().cast());
            // SAFETY: F16C; 16 bytes lie behind each pointer.
            unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(low)), _mm256_cvtph_ps(_mm_loadu_si128(high))] }
        }
        #[inline(always)]
        fn load_f16_half(self, x: &[f16; HALF]) -> Self::V {
            // SAFETY: F16C; 16 bytes lie behind the reference.
            unsafe { [_mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())), _mm256_setzero_ps()] }
        }
        #[inline(always)]
        fn store(self, v: Self::V, out: &mut [f32; LANES]) {
            // SAFETY: AVX2; sixteen values lie behind the reference.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
                _mm256_storeu_ps(out.as_mut_ptr().add(HALF), v[1]);
            }
        }
        #[inline(always)]
        fn add(self, a: Self::V, b: Self::V) -> Self::V {
            both!(_mm256_add_ps, a, b)
        }
        #[inline(always)]
        fn sub(self, a: Self::V, b: Self::V) -> Self::V {
            both!(_mm256_sub_ps, a, b)
        }
        #[inline(always)]
        fn mul(self, a: Self::V, b: Self::V) -> Self::V {
            both!(_mm256_mul_ps, a, b)
        }
        #[inline(always)]
        fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            both!(_mm256_fmadd_ps, a, b, c)
        }
        #[inline(always)]
        fn min(self, a: Self::V, b: Self::V) -> Self::V {
            both!(_mm256_min_ps, a, b)
        }
        #[inline(always)]
        fn max(self, a: Self::V, b: Self::V) -> Self::V {
            both!(_mm256_max_ps, a, b)
        }
        #[inline(always)]
        fn zero_below(self, x: Self::V, bound: f32, v: Self::V) -> Self::V {
            // SAFETY: AVX2.
            unsafe {
                let bound = _mm256_set1_ps(bound);
                [
                    _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x[0], bound), v[0]),
                    _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x[1], bound), v[1]),
                ]
            }
        }
        #[inline(always)]
        fn low_bits_as_exponent(self, v: Self::V) -> Self::V {
            // SAFETY: AVX2.
            unsafe {
                [
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(v[0]))),
                    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(v[1]))),
                ]
            }
        }
        #[inline(always)]
        fn sum(self, v: Self::V) -> f32 {
            // SAFETY: AVX2.
            sum_of_eight(unsafe { _mm256_add_ps(v[0], v[1]) })
        }
        #[inline(always)]
        fn max_lane(self, v: Self::V) -> f32 {
            // SAFETY: AVX2.
            max_of_eight(unsafe { _mm256_max_ps(v[0], v[1]) })
        }
    }
}
