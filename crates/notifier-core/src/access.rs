// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Rights: what an access wants and what a translation grants.

use core::fmt;

bitflags::bitflags! {
    /// A set of rights. What a format cannot express it refuses with a typed error; it never rounds rights up.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Access: u8 {
        /// Data reads.
        const READ = 1;
        /// Data writes.
        const WRITE = 2;
        /// Instruction fetches.
        const EXECUTE = 4;
        /// Reads and writes.
        const RW = 3;
        /// Reads and fetches.
        const RX = 5;
        /// Everything.
        const RWX = 7;
    }
}

impl Access {
    /// These rights without writing.
    #[must_use]
    pub const fn read_only(self) -> Self {
        self.difference(Self::WRITE)
    }

    /// Whether writing is among them.
    pub const fn writable(self) -> bool {
        self.contains(Self::WRITE)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        for (bit, letter) in [(Self::READ, "r"), (Self::WRITE, "w"), (Self::EXECUTE, "x")] {
            if self.contains(bit) {
                f.write_str(letter)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
