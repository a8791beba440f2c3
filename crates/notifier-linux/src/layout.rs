// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is mapped where in one region, as intervals. Neighbours that continue each other are one interval, as they are one
//! mapping for the kernel (mostly), so that a layout is no larger than the process's list of mappings.

use std::{collections::BTreeMap, fs::File, sync::Arc};

use notifier_core::Access;

/// Bytes of a region, as offsets from its start: half-open, never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Span {
    pub(crate) fn len(&self) -> u64 {
        self.end - self.start
    }
}

/// What is mapped at a page.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// What vm-memory mapped there.
    Home,
    /// Private anonymous memory, in a region that is at home in a file.
    Anonymous,
    /// A file, private. The offset is that of the interval's first byte.
    File {
        file: Arc<File>,
        offset: u64,
        /// The home may still hold memory underneath.
        kept: bool,
    },
}

impl Place {
    /// The same place, `bytes` further on.
    fn after(&self, bytes: u64) -> Self {
        match self {
            Place::File { file, offset, kept } => {
                Place::File { file: Arc::clone(file), offset: offset + bytes, kept: *kept }
            }
            other => other.clone(),
        }
    }

    /// Whether `next` is what follows `len` bytes of this.
    fn continues(&self, len: u64, next: &Self) -> bool {
        match (self, next) {
            (Place::Home, Place::Home) | (Place::Anonymous, Place::Anonymous) => true,
            (
                Place::File { file, offset, kept },
                Place::File { file: next_file, offset: next_offset, kept: next_kept },
            ) => Arc::ptr_eq(file, next_file) && offset + len == *next_offset && kept == next_kept,
            _ => false,
        }
    }
}

/// An interval's place and rights.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) place: Place,
    pub(crate) access: Access,
    /// Calls failed, and so did what was to put things right: the kernel may have other rights there, or nothing at all.
    /// Whatever comes next makes its call, and does not rely on what is written here.
    pub(crate) unsure: bool,
}

impl Piece {
    pub(crate) fn new(place: Place, access: Access) -> Self {
        Self { place, access, unsure: false }
    }

    /// The same piece, `bytes` further on.
    pub(crate) fn after(&self, bytes: u64) -> Self {
        Self { place: self.place.after(bytes), ..*self }
    }

    /// Whether the home may hold memory: what the guest sees, or what lies under what it sees.
    pub(crate) fn home_holds(&self) -> bool {
        match self.place {
            Place::File { kept, .. } => kept,
            Place::Home | Place::Anonymous => true,
        }
    }

    fn continues(&self, len: u64, next: &Self) -> bool {
        (self.access, self.unsure) == (next.access, next.unsure) && self.place.continues(len, &next.place)
    }
}

/// All pieces of a region.
#[derive(Debug)]
pub(crate) struct Layout {
    /// By start; each ends where the next begins.
    pieces: BTreeMap<u64, Piece>,
    len: u64,
}

impl Layout {
    pub(crate) fn new(len: u64, access: Access) -> Self {
        Self { pieces: BTreeMap::from([(0, Piece::new(Place::Home, access))]), len }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.pieces.len()
    }

    /// The piece that holds the byte at `offset`, from there on, and the whole piece's bytes.
    pub(crate) fn at(&self, offset: u64) -> Option<(Span, Piece)> {
        let (&start, piece) = self.pieces.range(..=offset).next_back()?;
        let end = self.pieces.range(offset + 1..).next().map_or(self.len, |(&next, _)| next);
        (offset < end).then(|| (Span { start, end }, piece.after(offset - start)))
    }

    /// How many more pieces there are when `span` is one of its own, by its ends: those inside of pieces cut them.
    pub(crate) fn cuts(&self, span: Span) -> u64 {
        let inside = |at: u64| u64::from(at < self.len && !self.pieces.contains_key(&at));
        inside(span.start) + inside(span.end)
    }

    /// What `span` is made of, in order, cut to it.
    pub(crate) fn within(&self, span: Span) -> impl Iterator<Item = (Span, Piece)> + '_ {
        let first = self.pieces.range(..=span.start).next_back().map_or(span.start, |(&start, _)| start);
        let mut pieces = self.pieces.range(first..span.end).peekable();
        std::iter::from_fn(move || {
            let (&start, piece) = pieces.next()?;
            let end = pieces.peek().map_or(self.len, |&(&next, _)| next);
            let part = Span { start: start.max(span.start), end: end.min(span.end) };
            Some((part, piece.after(part.start - start)))
        })
    }

    /// Puts `piece` over `span`.
    pub(crate) fn set(&mut self, span: Span, piece: Piece) {
        self.split(span.start);
        self.split(span.end);
        // One piece is the common case, and needs no list of keys.
        while let Some((&inner, _)) = self.pieces.range(span.start..span.end).next() {
            self.pieces.remove(&inner);
        }
        self.pieces.insert(span.start, piece);
        self.join(span.end);
        self.join(span.start);
    }

    /// A piece begins at `at`, unless the region ends there.
    fn split(&mut self, at: u64) {
        if at >= self.len || self.pieces.contains_key(&at) {
            return;
        }
        if let Some((&start, piece)) = self.pieces.range(..at).next_back() {
            let rest = piece.after(at - start);
            self.pieces.insert(at, rest);
        }
    }

    /// The piece that begins at `at` and the one before it are one, if they continue each other.
    fn join(&mut self, at: u64) {
        let Some(next) = self.pieces.get(&at) else { return };
        if let Some((&start, piece)) = self.pieces.range(..at).next_back() {
            if piece.continues(at - start, next) {
                self.pieces.remove(&at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const PAGES: u64 = 24;

    /// What a page is, in one number: the model keeps one for each page.
    fn digest(piece: &Piece, files: &[Arc<File>]) -> (u64, u8, bool) {
        let place = match &piece.place {
            Place::Home => 0,
            Place::Anonymous => 1,
            Place::File { file, offset, kept } => {
                let index = files.iter().position(|other| Arc::ptr_eq(file, other)).unwrap() as u64;
                2 + u64::from(*kept) + 2 * index + 4 * offset / PAGE
            }
        };
        (place, piece.access.bits(), piece.unsure)
    }

    #[test]
    fn a_layout_is_what_a_list_of_pages_is() {
        let file = || Arc::new(File::open("/dev/null").unwrap());
        let files = [file(), file()];
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let mut layout = Layout::new(PAGES * PAGE, Access::RW);
        let mut model = vec![(0, Access::RW.bits(), false); PAGES as usize];
        for _ in 0..20_000 {
            let first = next(PAGES);
            let count = 1 + next(PAGES - first);
            let access = if next(4) == 0 { Access::READ } else { Access::RW };
            let place = match next(4) {
                0 => Place::Home,
                1 => Place::Anonymous,
                _ => Place::File {
                    file: Arc::clone(&files[next(2) as usize]),
                    // Few distances, so that neighbours often continue each other.
                    offset: (first + 8 * next(2)) * PAGE,
                    kept: next(2) == 0,
                },
            };
            let piece = Piece { place, access, unsure: next(8) == 0 };
            for page in first..first + count {
                model[page as usize] = digest(&piece.after((page - first) * PAGE), &files);
            }
            let span = Span { start: first * PAGE, end: (first + count) * PAGE };
            let most = layout.count() as u64 + layout.cuts(span);
            layout.set(span, piece);
            assert!(layout.count() as u64 <= most);

            let mut seen = Vec::new();
            let mut pieces: Vec<(Span, Piece)> = Vec::new();
            for (span, piece) in layout.within(Span { start: 0, end: PAGES * PAGE }) {
                assert_eq!(span.start, pieces.last().map_or(0, |(last, _)| last.end));
                for page in 0..span.len() / PAGE {
                    seen.push(digest(&piece.after(page * PAGE), &files));
                }
                pieces.push((span, piece));
            }
            assert_eq!(seen, model);
            assert_eq!(pieces.len(), layout.count());
            for pair in pieces.windows(2) {
                assert!(!pair[0].1.continues(pair[0].0.len(), &pair[1].1), "{pair:?} is one piece");
            }
            let page = next(PAGES);
            let (span, piece) = layout.at(page * PAGE).unwrap();
            assert!(span.start <= page * PAGE && page * PAGE < span.end);
            assert_eq!(digest(&piece, &files), model[page as usize]);
        }
        assert!(layout.at(PAGES * PAGE).is_none());
    }
}
