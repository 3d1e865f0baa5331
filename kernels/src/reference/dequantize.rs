//! Reads matrices of any stored format into f32, by way of candle where it knows the format.
//!
//! **Invariant:** nothing here is shared with the kernels that it judges.

use std::borrow::Cow;

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QStorage, QTensor},
};
use half::f16;
use phalanx_formats::StoredType;

use crate::{HostMatrix, KernelError};

/// `[rows, cols]` in f32.
///
/// # Errors
/// Bytes that are no such matrix.
pub(super) fn dequantize(matrix: &HostMatrix) -> Result<Tensor, KernelError> {
    let HostMatrix { dtype, rows, cols, ref data } = *matrix;
    let bytes = dtype.row_bytes(cols).map(|row| row * rows);
    if bytes != Some(data.len()) || data.is_empty() {
        let reason = format!("{} bytes for {rows} x {cols} of {dtype:?}", data.len());
        return Err(KernelError::Shape { op: "matrix", reason });
    }
    let (shape, cpu) = ((rows, cols), &Device::Cpu);
    let plain = |dtype| -> Result<Tensor, KernelError> {
        Ok(Tensor::from_raw_buffer(data, dtype, &[rows, cols], cpu)?.to_dtype(DType::F32)?)
    };
    let ggml = match dtype {
        StoredType::F32 => return plain(DType::F32),
        StoredType::F16 => return plain(DType::F16),
        StoredType::BF16 => return plain(DType::BF16),
        StoredType::IQ4NL => return Ok(Tensor::from_vec(iq4_nl(data), shape, cpu)?),
        StoredType::Q4_0 => GgmlDType::Q4_0,
        StoredType::Q4_1 => GgmlDType::Q4_1,
        StoredType::Q5_0 => GgmlDType::Q5_0,
        StoredType::Q5_1 => GgmlDType::Q5_1,
        StoredType::Q8_0 => GgmlDType::Q8_0,
        StoredType::Q4K => GgmlDType::Q4K,
        StoredType::Q5K => GgmlDType::Q5K,
        StoredType::Q6K => GgmlDType::Q6K,
    };
    let storage = QStorage::from_data(Cow::Borrowed(data), cpu, ggml)?;
    Ok(QTensor::new(storage, shape)?.dequantize(cpu)?)
}

/// The values that the nibbles of IQ4_NL stand for.
const IQ4_NL: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Blocks of 32: an f16 scale, then 16 bytes whose low nibbles are the first half.
fn iq4_nl(data: &[u8]) -> Vec<f32> {
    let mut values = Vec::with_capacity(data.len() / 18 * 32);
    for block in data.as_chunks::<18>().0 {
        let [low, high, codes @ ..] = block;
        let scale = f16::from_le_bytes([*low, *high]).to_f32();
        let value = |code: u8| scale * f32::from(IQ4_NL[usize::from(code)]);
        values.extend(codes.iter().map(|code| value(code & 15)));
        values.extend(codes.iter().map(|code| value(code >> 4)));
    }
    values
}
