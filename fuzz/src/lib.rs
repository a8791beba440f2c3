// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What every input has to keep: the bodies of the fuzz targets.
//!
//! A target is a function of bytes that panics where something does not hold. [`TARGETS`] has them all. `fuzz_targets/` gives
//! each to libFuzzer; `tests/corpora.rs` replays `corpus/` and `regressions/` through all of them with a stable compiler.
//!
//! | target | what it takes the bytes for | what has to hold |
//! |---|---|---|
//! | `decode` | a format with options, and raw entries | [`decode`]: nothing panics, what passes a check is what its spec says, every operation keeps it so |
//! | `script` | options, and the text of a script | [`script`]: exit status, `line N:`, as many rows as `end N` says |
//! | `protocol` | windows, faults, leases, members, slots of one space | [`protocol`]: the invariants I1 to I8, I10, I11 |
//! | `ept`, `npt`, `x86_64`, `la57`, `arm64_s2`, `ppc_radix`, `mips64` | options of a format, and operations | [`ops`]: table and model agree after each |
//! | `out_of_memory` | the same, and which allocations fail | [`ops`]: what is left is as before or as asked for |
#![warn(missing_docs)]

pub mod bytes;
pub mod decode;
pub mod ops;
pub mod protocol;
pub mod script;

/// A target: its name, which is that of its program, and its body.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name.
    pub name: &'static str,
    /// Runs one input; panics where something does not hold.
    pub run: fn(&[u8]),
}

/// Every target.
pub const TARGETS: &[Target] = &[
    Target { name: "decode", run: decode::run },
    Target { name: "script", run: script::run },
    Target { name: "protocol", run: protocol::run },
    Target { name: "ept", run: ops::ept },
    Target { name: "npt", run: ops::npt },
    Target { name: "x86_64", run: ops::x86_64 },
    Target { name: "la57", run: ops::la57 },
    Target { name: "arm64_s2", run: ops::arm64_s2 },
    Target { name: "ppc_radix", run: ops::ppc_radix },
    Target { name: "mips64", run: ops::mips64 },
    Target { name: "out_of_memory", run: ops::out_of_memory },
];

/// Runs the body of one target on files: what a target's program does where libFuzzer is not there.
pub fn replay(run: fn(&[u8])) {
    for path in std::env::args_os().skip(1) {
        match std::fs::read(&path) {
            Ok(data) => run(&data),
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                std::process::exit(2);
            }
        }
        println!("{}: holds", path.display());
    }
}
