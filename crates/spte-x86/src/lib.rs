//! spte-x86
