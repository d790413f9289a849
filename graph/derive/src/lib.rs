//! graph-derive
