// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU's statistics, as the kernel counts them.
//!
//! `Documentation/virt/kvm/api.rst`, 4.130 `KVM_GET_STATS_FD`: a file of a header, an id string, descriptors, and the values.
//! Names and places are found in the descriptors; they differ between kernels.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, FromRawFd},
        unix::fs::FileExt,
    },
};

use kvm_bindings::KVMIO;
use vmm_sys_util::{ioctl::ioctl, ioctl_io_nr};

use crate::machine::MachineError;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Bytes of `struct kvm_stats_header`: flags, name size, number of descriptors, and where id, descriptors and data begin.
const HEADER: usize = 24;
/// Bytes of `struct kvm_stats_desc` before its name: flags, exponent (2), size (2), offset, bucket size.
const DESCRIPTOR: usize = 16;
/// More descriptors, or longer names, than any kernel has: a file that says so is not read.
const MOST: u32 = 1 << 12;

/// One counter of one vCPU. Reading it takes no lock of the vCPU's, so that the vCPU may be running.
#[derive(Debug)]
pub(super) struct Counter {
    file: File,
    /// Where its value is.
    at: u64,
}

impl Counter {
    /// The counter with this name; `None` where the kernel has none, or no such statistics at all.
    pub(super) fn of(vcpu: &impl AsRawFd, name: &str) -> Result<Option<Self>, MachineError> {
        // SAFETY: the ioctl takes no argument and touches no memory of this process.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            let source = io::Error::last_os_error();
            // Before Linux 5.14 there is no such ioctl: ENOTTY, or EINVAL.
            let unknown = [rustix::io::Errno::NOTTY, rustix::io::Errno::INVAL].map(|errno| errno.raw_os_error());
            return match source.raw_os_error() {
                Some(errno) if unknown.contains(&errno) => Ok(None),
                _ => Err(MachineError::Call { call: "KVM_GET_STATS_FD", source }),
            };
        }
        // SAFETY: the kernel has just made this descriptor for us, and nobody else has it.
        let file = unsafe { File::from_raw_fd(fd) };
        Self::find(file, name).map_err(|source| MachineError::Stats { source })
    }

    fn find(file: File, name: &str) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let (name_size, descriptors) = (word(&header, 4), word(&header, 8));
        let (first, data) = (word(&header, 16), word(&header, 20));
        if name_size > MOST || descriptors > MOST {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let each = DESCRIPTOR + name_size as usize;
        let mut all = vec![0; each * descriptors as usize];
        file.read_exact_at(&mut all, u64::from(first))?;
        let called = |descriptor: &&[u8]| {
            let found = &descriptor[DESCRIPTOR..];
            let end = found.iter().position(|&byte| byte == 0).unwrap_or(found.len());
            found[..end] == *name.as_bytes()
        };
        let at = all.chunks_exact(each).find(called).map(|found| u64::from(data) + u64::from(word(found, 8)));
        Ok(at.map(|at| Self { file, at }))
    }

    /// Its value now.
    pub(super) fn read(&self) -> Result<u64, MachineError> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.at).map_err(|source| MachineError::Stats { source })?;
        Ok(u64::from_ne_bytes(value))
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |word| u32::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file as the documentation describes it: header, id, two descriptors of 16 + 8 bytes, two values.
    fn file(bytes: &[u8]) -> File {
        let file = File::from(rustix::fs::memfd_create("statistics", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.write_all_at(bytes, 0).unwrap();
        file
    }

    fn statistics() -> Vec<u8> {
        let mut bytes = Vec::new();
        [0u32, 8, 2, 24, 32, 80].iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
        bytes.extend(b"kvm-1/v\0");
        for (offset, name) in [(0u32, b"exits\0\0\0"), (8, b"pf_take\0")] {
            bytes.extend([0; 6]);
            bytes.extend(1u16.to_ne_bytes());
            bytes.extend(offset.to_ne_bytes());
            bytes.extend([0; 4]);
            bytes.extend(name);
        }
        bytes.extend(7u64.to_ne_bytes());
        bytes.extend(1234u64.to_ne_bytes());
        bytes
    }

    #[test]
    fn a_counter_is_found_by_its_whole_name() {
        let value = |name| Counter::find(file(&statistics()), name).unwrap().map(|counter| counter.read().unwrap());
        assert_eq!(value("pf_take"), Some(1234));
        assert_eq!(value("exits"), Some(7));
        assert_eq!(value("pf_taken"), None);
        assert_eq!(value("exit"), None);
    }

    #[test]
    fn a_file_that_ends_early_is_an_error() {
        let whole = statistics();
        assert!(Counter::find(file(&whole[..20]), "exits").is_err());
        assert!(Counter::find(file(&whole[..70]), "exits").is_err());
        let counter = Counter::find(file(&whole[..84]), "exits").unwrap().unwrap();
        assert!(counter.read().is_err());
        let mut absurd = whole;
        absurd[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(Counter::find(file(&absurd), "exits").is_err());
    }
}
