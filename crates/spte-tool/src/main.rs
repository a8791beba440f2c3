// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `spte` command. See the library.
#![forbid(unsafe_code)]

use std::io::{self, BufWriter, IsTerminal, LineWriter, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let (stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    // Whoever types a script wants each answer at once.
    let mut stdout: Box<dyn Write> =
        if stdout.is_terminal() { Box::new(LineWriter::new(stdout)) } else { Box::new(BufWriter::new(stdout)) };
    spte_tool::cli::run(std::env::args_os(), &mut io::stdin().lock(), &mut stdout, &mut stderr).into()
}
