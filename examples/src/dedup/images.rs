// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What guests' RAM is filled with: the contents of real files.
//!
//! All guests get the same files, each in an order of its own, so that equal pages lie at different addresses. The
//! images stay in memory, read-only, as the ledger's idea of what an unwritten page holds.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::memory::{PAGE, PageBytes};

/// Where shared libraries are looked for.
const LIBRARY_DIRS: [&str; 5] = ["/usr/lib", "/lib", "/usr/lib64", "/lib64", "/usr/local/lib"];
/// Directories below those are searched this deep.
const DEPTH: usize = 3;
/// Smaller files are not worth opening.
const WORTH_OPENING: u64 = 16 << 10;

/// An image that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// It cannot be read.
    #[error("cannot read the image {}: {source}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is a directory or a device.
    #[error("the image {} is not a regular file", path.display())]
    NotAFile {
        /// What was named.
        path: PathBuf,
    },
    /// It holds nothing.
    #[error("the image {} is empty", path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
}

/// Pages of real files, one file after the other, each beginning a page.
#[derive(Debug)]
pub(crate) struct Images {
    bytes: Vec<u8>,
    /// First page of each file, ascending.
    starts: Vec<usize>,
    files: usize,
    times: usize,
}

impl Images {
    /// `pages` pages of the files named, or of the machine's shared libraries where none is. Where the files have fewer,
    /// they are repeated, with eight bytes of every page changed each time.
    pub(crate) fn load(named: &[PathBuf], pages: usize, seed: u64) -> Result<Self, ImageError> {
        let mut images = Self { bytes: Vec::with_capacity(pages * PAGE), starts: Vec::new(), files: 0, times: 1 };
        if named.is_empty() {
            let mut paths = libraries();
            paths.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
            for path in paths {
                // A library that vanished or cannot be read is not the user's mistake.
                let _ = images.append(&path, pages);
            }
            if images.bytes.is_empty() {
                // This program is a real file too.
                let path = std::env::current_exe()
                    .map_err(|source| ImageError::Unreadable { path: PathBuf::from("/proc/self/exe"), source })?;
                images.append(&path, pages)?;
            }
        } else {
            for path in named {
                images.append(path, pages)?;
            }
        }
        images.files = images.starts.len();
        images.repeat(pages);
        Ok(images)
    }

    fn append(&mut self, path: &Path, pages: usize) -> Result<(), ImageError> {
        let unreadable = |source| ImageError::Unreadable { path: path.into(), source };
        let meta = fs::metadata(path).map_err(unreadable)?;
        if !meta.is_file() {
            return Err(ImageError::NotAFile { path: path.into() });
        }
        let room = (pages * PAGE).saturating_sub(self.bytes.len());
        let mut file = io::Read::take(fs::File::open(path).map_err(unreadable)?, room as u64);
        let start = self.bytes.len();
        if let Err(source) = io::Read::read_to_end(&mut file, &mut self.bytes) {
            self.bytes.truncate(start);
            return Err(unreadable(source));
        }
        if meta.len() == 0 {
            return Err(ImageError::Empty { path: path.into() });
        }
        if self.bytes.len() > start {
            self.starts.push(start / PAGE);
            self.bytes.resize(self.bytes.len().next_multiple_of(PAGE), 0);
        }
        Ok(())
    }

    fn repeat(&mut self, pages: usize) {
        let (once, files) = (self.bytes.len(), self.starts.len());
        while self.bytes.len() < pages * PAGE {
            let base = self.bytes.len();
            let len = once.min(pages * PAGE - base);
            self.bytes.extend_from_within(..len);
            for (index, page) in self.bytes[base..].chunks_exact_mut(PAGE).enumerate() {
                let mark = ((self.times as u64) << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                page[..8].copy_from_slice(&mark.to_le_bytes());
            }
            let again = self.starts[..files].iter().map(|start| start + base / PAGE);
            let again: Vec<_> = again.filter(|&start| start * PAGE < base + len).collect();
            self.starts.extend(again);
            self.times += 1;
        }
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.bytes.len() / PAGE
    }

    /// How many files were read.
    pub(crate) fn files(&self) -> usize {
        self.files
    }

    /// How many times they were used, the last time perhaps in part.
    pub(crate) fn times(&self) -> usize {
        self.times
    }

    /// The contents of a page. Pages past the end read as the last.
    pub(crate) fn page(&self, index: u32) -> &PageBytes {
        let last = self.pages().saturating_sub(1);
        let at = (index as usize).min(last) * PAGE;
        let (page, _) = self.bytes[at..].split_first_chunk().unwrap_or((&[0; PAGE], &[]));
        page
    }

    /// An order of all pages: file by file, the files shuffled by `seed`.
    pub(crate) fn layout(&self, seed: u64) -> Vec<u32> {
        let ends = self.starts.iter().skip(1).copied().chain([self.pages()]);
        let mut files: Vec<_> = self.starts.iter().copied().zip(ends).collect();
        files.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        files.into_iter().flat_map(|(start, end)| start as u32..end as u32).collect()
    }
}

/// The shared libraries of this machine, each once, by path.
fn libraries() -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    let mut todo: Vec<_> = LIBRARY_DIRS.iter().map(|dir| (PathBuf::from(dir), 0)).collect();
    while let Some((dir, depth)) = todo.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            let Ok(meta) = fs::metadata(&path) else { continue };
            let library = || path.file_name().is_some_and(|name| name.to_string_lossy().contains(".so"));
            if meta.is_dir() && depth < DEPTH {
                if seen.insert((meta.dev(), meta.ino())) {
                    todo.push((path, depth + 1));
                }
            } else if meta.is_file()
                && meta.len() >= WORTH_OPENING
                && library()
                && seen.insert((meta.dev(), meta.ino()))
            {
                found.push(path);
            }
        }
    }
    // The order of directory entries is the file system's: the choice is to be the seed's.
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_the_same_for_the_same_seed_and_fill_what_was_asked() {
        let (one, two) = (Images::load(&[], 512, 7).unwrap(), Images::load(&[], 512, 7).unwrap());
        assert_eq!(one.pages(), 512);
        assert_eq!(one.bytes, two.bytes);
        assert_eq!(one.layout(3), two.layout(3));
    }

    #[test]
    fn a_layout_has_every_page_once() {
        let images = Images::load(&[], 300, 1).unwrap();
        let mut layout = images.layout(5);
        layout.sort_unstable();
        assert!(layout.into_iter().eq(0..300));
    }

    #[test]
    fn small_files_are_repeated_with_variation() {
        let path = std::env::temp_dir().join(format!("dedup-image-{}", std::process::id()));
        fs::write(&path, vec![5; PAGE + 1]).unwrap();
        let images = Images::load(std::slice::from_ref(&path), 7, 1).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!((images.pages(), images.files(), images.times()), (7, 1, 4));
        let distinct: HashSet<_> = (0..7).map(|page| *images.page(page)).collect();
        assert_eq!(distinct.len(), 7);
        assert!(images.layout(1).len() == 7);
    }

    #[test]
    fn bad_images_are_named() {
        let load = |path: &str| Images::load(&[PathBuf::from(path)], 4, 1).unwrap_err();
        assert!(matches!(load("/nowhere"), ImageError::Unreadable { .. }));
        assert!(matches!(load("/"), ImageError::NotAFile { .. }));
    }
}
