//! Which instructions the kernels use.
//!
//! **Invariant:** an `Isa` other than `Scalar` exists only where the CPU has its instructions.

/// A tier of instructions. All tiers compute the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Tier);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier {
    /// AVX-512 F, BW, VL and VNNI.
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// What the compiler makes of plain code.
    Scalar,
}

impl Isa {
    /// The tiers that this machine has, best first.
    pub fn available() -> Vec<Self> {
        let mut tiers = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let has_avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let has_avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni");
            if has_avx2 && has_avx512 {
                tiers.push(Self(Tier::Avx512));
            }
            if has_avx2 {
                tiers.push(Self(Tier::Avx2));
            }
        }
        tiers.push(Self(Tier::Scalar));
        tiers
    }

    /// The best tier of this machine.
    pub fn detect() -> Self {
        Self::available().first().copied().unwrap_or(Self(Tier::Scalar))
    }

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Tier::Avx512 => "AVX-512 with VNNI",
            Tier::Avx2 => "AVX2",
            Tier::Scalar => "any processor",
        }
    }

    pub(super) fn tier(self) -> Tier {
        self.0
    }
}
