// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How a stub inside an emulator is asked, and answers: one page of its memory.
//!
//! | word | |
//! |---|---|
//! | 0 | number of the request; written last |
//! | 1 | command |
//! | 2 to 8 | arguments |
//! | 16 | number of the answer: the request's; written last |
//! | 17 to 24 | results |
//! | 32 to 511 | a list of pairs, for requests that take one |
//!
//! All are 64 bits in the machine's byte order. A stub takes the number of the last request from word 16 when it starts, so that
//! a request that was there first is not lost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::emulator::{Emulator, Lost};
use crate::memory::Memory;

/// How long a stub may take to answer. It takes microseconds; starting takes part of a second.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The most pairs that a list has.
pub const MOST_PAIRS: usize = 240;

/// Eight words of answer.
pub type Results = [u64; 8];

/// The page by which a stub is asked.
#[derive(Debug)]
pub struct Mailbox {
    memory: Arc<Memory>,
    at: u64,
    request: u64,
}

impl Mailbox {
    /// The mailbox at this output address.
    pub fn new(memory: Arc<Memory>, at: u64) -> Self {
        Self { memory, at, request: 0 }
    }

    fn word(&self, number: u64) -> u64 {
        self.memory.load(self.at + 8 * number)
    }

    fn set(&self, number: u64, value: u64) {
        self.memory.store(self.at + 8 * number, value);
    }

    /// Leaves a list for the next request.
    ///
    /// # Panics
    /// With more than [`MOST_PAIRS`].
    pub fn list(&self, pairs: &[(u64, u64)]) {
        assert!(pairs.len() <= MOST_PAIRS, "{} pairs are too many", pairs.len());
        for (number, (first, second)) in pairs.iter().enumerate() {
            self.set(32 + 2 * number as u64, *first);
            self.set(33 + 2 * number as u64, *second);
        }
    }

    /// The second halves of the list, as the stub left them.
    pub fn listed(&self, number: usize) -> u64 {
        self.word(33 + 2 * number as u64)
    }

    /// Asks, and does not wait.
    pub fn ask(&mut self, command: u64, arguments: &[u64]) {
        self.request += 1;
        self.set(1, command);
        for (number, argument) in arguments.iter().enumerate() {
            self.set(2 + number as u64, *argument);
        }
        self.set(0, self.request);
    }

    /// The answer, if it is there.
    pub fn answer(&self) -> Option<Results> {
        (self.word(16) == self.request).then(|| std::array::from_fn(|number| self.word(17 + number as u64)))
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// [`Lost`]: the emulator ended, or there was none for long.
    pub fn wait(&self, emulator: &mut Emulator) -> Result<Results, Lost> {
        let mut since: Option<Instant> = None;
        loop {
            for _ in 0..2_000 {
                if let Some(answer) = self.answer() {
                    emulator.settle();
                    return Ok(answer);
                }
                std::hint::spin_loop();
            }
            emulator.alive()?;
            let since = *since.get_or_insert_with(Instant::now);
            if since.elapsed() > PATIENCE {
                return Err(Lost::Silent { seconds: PATIENCE.as_secs() });
            }
            // With fewer processors than spinning threads the machine needs this one.
            std::thread::yield_now();
        }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// As [`Mailbox::wait`].
    pub fn call(&mut self, emulator: &mut Emulator, command: u64, arguments: &[u64]) -> Result<Results, Lost> {
        self.ask(command, arguments);
        self.wait(emulator)
    }
}
