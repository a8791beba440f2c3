// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Emulators: where they are, how stubs for them are assembled, and that they end.

use std::fs;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;
use thiserror::Error;

use crate::memory::MemoryError;

/// A program, and the Debian package that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tool {
    /// The program.
    pub name: &'static str,
    /// The package.
    pub package: &'static str,
}

/// Why a machine does not run.
#[derive(Debug, Error)]
pub enum Lost {
    /// A program is not installed.
    #[error("{} is not here: it is in the package {}", .0.name, .0.package)]
    Missing(Tool),
    /// Something else that the machine needs is not there.
    #[error("{0}")]
    Needs(String),
    /// This computer does not have it, and nothing that could be installed would help.
    #[error("{0}")]
    NotHere(String),
    /// There is no memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A program could not be run.
    #[error("{program} could not be run: {source}")]
    Run {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed: {said}")]
    Failed {
        /// The program.
        program: String,
        /// What it said.
        said: String,
    },
    /// The emulator has ended.
    #[error("the emulator ended: {said}")]
    Ended {
        /// What it said.
        said: String,
    },
    /// The stub does not answer.
    #[error("no answer for {seconds} seconds")]
    Silent {
        /// How long.
        seconds: u64,
    },
    /// The stub answered what it must not.
    #[error("the stub answered {0}")]
    Answer(String),
}

impl Lost {
    /// Whether to go on without the machine: nothing is wrong with it, it is not here. With `require` that is so only where
    /// nothing that could be installed would help.
    pub fn passes_over(&self, require: bool) -> bool {
        match self {
            Self::NotHere(_) => true,
            Self::Missing(_) | Self::Needs(_) => !require,
            _ => false,
        }
    }
}

/// Where programs are.
#[derive(Debug, Clone, Default)]
pub struct Tools {
    /// A folder in which packages were unpacked, looked at before PATH.
    root: Option<PathBuf>,
}

impl Tools {
    /// Programs of this folder in which packages were unpacked, or else of PATH.
    pub fn new(root: Option<PathBuf>) -> Self {
        Self { root }
    }

    fn find(&self, name: &str) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let unpacked = self.root.iter().map(|root| root.join("usr/bin"));
        unpacked.chain(std::env::split_paths(&path)).map(|folder| folder.join(name)).find(|file| file.is_file())
    }

    /// The command that runs a program, with the libraries it was unpacked with.
    ///
    /// # Errors
    /// [`Lost::Missing`].
    pub fn command(&self, tool: Tool) -> Result<Command, Lost> {
        let mut command = Command::new(self.find(tool.name).ok_or(Lost::Missing(tool))?);
        if let Some(root) = &self.root {
            let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/pulseaudio"];
            let libraries = libraries.map(|folder| root.join(folder).display().to_string());
            command.env("LD_LIBRARY_PATH", libraries.join(":"));
        }
        Ok(command)
    }

    /// Where an unpacked package has a file or folder: below the folder, or where it would be installed.
    pub fn file(&self, path: &str) -> PathBuf {
        let unpacked = self.root.as_ref().map(|root| root.join(path));
        unpacked.filter(|file| file.exists()).unwrap_or_else(|| Path::new("/").join(path))
    }

    /// A command for QEMU: its program, its data, and no device that nobody asked for.
    ///
    /// # Errors
    /// [`Lost::Missing`].
    pub fn qemu(&self, tool: Tool) -> Result<Command, Lost> {
        let mut command = self.command(tool)?;
        command.arg("-L").arg(self.file("usr/share/qemu"));
        let quiet = "-accel tcg -nodefaults -display none -monitor none -serial none -parallel none";
        command.args(quiet.split(' '));
        Ok(command)
    }
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Result<(), Lost> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|source| Lost::Run { program: program.clone(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Lost::Failed { program, said })
}

/// The assembler, linker and copier of a target.
#[derive(Debug, Clone, Copy)]
pub struct Assembler {
    /// What their names begin with, such as `aarch64-linux-gnu-`.
    pub prefix: [&'static str; 3],
    /// The package that has them.
    pub package: &'static str,
    /// Options of the assembler.
    pub options: &'static [&'static str],
    /// Options of the linker.
    pub link: &'static [&'static str],
}

/// A folder for the files of one machine, which goes with it.
#[derive(Debug)]
pub struct Workshop {
    folder: TempDir,
}

impl Workshop {
    /// An empty one.
    ///
    /// # Errors
    /// [`Lost::Run`].
    pub fn new() -> Result<Self, Lost> {
        let folder = TempDir::with_prefix("conformance-");
        folder.map(|folder| Self { folder }).map_err(|source| Lost::Run { program: "a folder".to_owned(), source })
    }

    /// A file in it, by name.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file into it.
    ///
    /// # Errors
    /// [`Lost::Run`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, Lost> {
        let file = self.file(name);
        fs::write(&file, bytes).map_err(|source| Lost::Run { program: format!("writing {name}"), source })?;
        Ok(file)
    }

    /// Assembles `source`, to run at `address`: its bytes from there on.
    ///
    /// # Errors
    /// [`Lost`], with what the assembler said.
    pub fn assemble(
        &self,
        tools: &Tools,
        assembler: &Assembler,
        name: &str,
        source: &str,
        address: u64,
    ) -> Result<Vec<u8>, Lost> {
        let [assemble, link, copy] = assembler.prefix;
        let tool = |name| Tool { name, package: assembler.package };
        let file = |kind: &str| self.file(&format!("{name}.{kind}"));
        self.write(&format!("{name}.S"), source.as_bytes())?;
        run(tools.command(tool(assemble))?.args(assembler.options).arg("-o").args([file("o"), file("S")]))?;
        let place = format!("-Ttext={address:#x}");
        run(tools
            .command(tool(link))?
            .args(assembler.link)
            .args([&place, "-e", "0", "-o"])
            .args([file("elf"), file("o")]))?;
        let mut copy = tools.command(tool(copy))?;
        run(copy.args(["-O", "binary", "-j", ".text"]).args([file("elf"), file("bin")]))?;
        fs::read(file("bin")).map_err(|source| Lost::Run { program: "reading what was assembled".to_owned(), source })
    }
}

/// An emulator that runs. It ends with this value, and with the thread that made it.
#[derive(Debug)]
pub struct Emulator {
    child: Child,
    /// What it says on standard error.
    said: fs::File,
    /// What it reads when it starts.
    workshop: Option<Workshop>,
}

impl Emulator {
    /// Starts it.
    ///
    /// # Errors
    /// [`Lost::Run`].
    pub fn start(mut command: Command, workshop: Workshop) -> Result<Self, Lost> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |source| Lost::Run { program: program.clone(), source };
        let said = fs::File::create_new(workshop.file("said")).map_err(failed)?;
        let heard = fs::File::open(workshop.file("said")).map_err(failed)?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said);
        command.current_dir(workshop.folder.path());
        // SAFETY: between fork and exec there is one system call, and no memory is allocated.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
                Ok(())
            });
        }
        let child = command.spawn().map_err(failed)?;
        Ok(Self { child, said: heard, workshop: Some(workshop) })
    }

    /// Removes its files: the stub has answered, so that they were read. Whoever kills this program later leaves none behind.
    pub(crate) fn settle(&mut self) {
        self.workshop = None;
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// [`Lost::Ended`] if not.
    pub fn alive(&mut self) -> Result<(), Lost> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            _ => {
                let mut said = String::new();
                // What cannot be read is not told; that it ended is.
                let _ = (&self.said).rewind().and_then(|()| (&self.said).read_to_string(&mut said));
                Err(Lost::Ended { said: said.trim().to_owned() })
            }
        }
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended by itself, and then both have nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_ended_emulator_said_is_told_though_its_files_are_gone() {
        let workshop = Workshop::new().unwrap();
        let folder = workshop.folder.path().to_owned();
        let mut command = Command::new("sh");
        command.args(["-c", "read line < line; echo $line >&2"]);
        rustix::fs::mkfifoat(rustix::fs::CWD, workshop.file("line"), rustix::fs::Mode::RWXU).unwrap();
        let line = workshop.file("line");
        let mut emulator = Emulator::start(command, workshop).unwrap();
        emulator.alive().unwrap();
        // Opened, so that the name is no longer needed.
        let mut end = fs::OpenOptions::new().write(true).open(line).unwrap();
        emulator.settle();
        assert!(!folder.exists());
        io::Write::write_all(&mut end, b"no such CPU\n").unwrap();
        drop(end);
        emulator.child.wait().unwrap();
        let ended = emulator.alive().unwrap_err();
        assert!(matches!(&ended, Lost::Ended { said } if said == "no such CPU"), "{ended:?}");
    }
}
