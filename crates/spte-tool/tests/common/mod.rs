// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command, run inside the test.
#![allow(dead_code, unreachable_pub)]

use std::ffi::OsString;

/// Exit status, standard output, standard error.
pub type Ran = (u8, String, String);

/// `spte WORDS`, with `input` on standard input.
pub fn spte(words: &[&str], input: &[u8]) -> Ran {
    let arguments = std::iter::once("spte").chain(words.iter().copied()).map(OsString::from);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = spte_tool::cli::run(arguments, &mut &*input, &mut out, &mut err);
    (status, String::from_utf8(out).unwrap(), String::from_utf8(err).unwrap())
}

/// `spte run --format FORMAT` of a script that is carried out to its end: what it prints.
pub fn run(options: &str, script: &str) -> String {
    let words: Vec<&str> = ["run", "--format"].into_iter().chain(options.split(' ')).collect();
    let (status, out, err) = spte(&words, script.as_bytes());
    assert_eq!((status, err.as_str()), (0, ""), "{script}");
    out
}
