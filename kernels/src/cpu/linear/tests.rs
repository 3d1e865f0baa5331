//! Products against f64, and bit for bit against themselves.
