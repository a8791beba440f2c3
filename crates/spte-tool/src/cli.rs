// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use clap::builder::PossibleValue;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use serde_json::json;
use spte_core::format::Level;
use thiserror::Error;

use crate::decode::{self, NotAnEntry};
use crate::format::ToolFormat;
use crate::image::{self, Image, ImageError, Trouble, Walk};
use crate::machine::{Machine, MachineError};
use crate::script::{self, Limits, ParseError};
use crate::setup::{FormatName, Options, Setup, SetupError, Use};

/// Exit status of everything that went wrong.
const FAILED: u8 = 2;

const EXAMPLES: &str = "\
Examples:
  $ spte decode --format ept 0600000005010b77
  $ printf 'map 0x200000 0x40000000 2m rwx page=max\\nchange 0x201000 0x7000\\nwalk 0x201000\\n' | spte run --format ept
  $ printf '\\007\\020' | cat - /dev/zero | head -c 8192 >table.img
  $ spte dump --format ept --root 0 table.img

Each command has more: spte help decode, spte help run, spte help dump.";

const DECODE_EXAMPLES: &str = "\
Examples:
  An entry from a kernel log, at the level the log says, and where the level is not known:
  $ spte decode --format ept --level 1 0x8600000005010b77
  $ spte decode --format npt 00000000050100e7

  An entry that no processor takes:
  $ spte decode --format ept --level 1 0x5002

  A guest page of an arm64 host, and a block of its 64K granule:
  $ spte decode --format arm64-s2 --level 3 0x4000008000177f
  $ spte decode --format arm64-s2 --granule 64k --level 2 0x00400000400007fd

  A directory entry of a radix tree, whose table has 256 bytes:
  $ spte decode --format ppc-radix --granule 64k --level 2 0x8000000034567105

  The bits that dumps print:
  $ spte decode --mask --format x86-64";

const RUN_EXAMPLES: &str = "\
Examples:
  $ printf 'map 0 0x10000000 4m rwx page=2m\\ntouch 0x1234 w\\ndirty 0 4m\\ndump\\n' | spte run --format npt
  $ printf 'map 0x1000 0x5000 8k rwx\\nwrprotect 0x1000 8k\\ntouch 0x2000 w\\ndirty 0 1m\\n' | spte run --format ept --json
  $ printf 'map 0x2000000 0x6000000 32m rw page=32m\\nwalk 0x2000000\\nflushes\\n' | spte run --format arm64-s2 --granule 16k
  $ printf 'map 0x10000 0x80000 64k rw\\nchange 0x10000 0x90000\\nwalk 0x10000\\nflushes\\n' | spte run --format ppc-radix --granule 64k

Commands, one a line; # begins a comment; sizes may be 4k 2m 1g 1t; PERM is a subset of rwx, or -:
  map GPA PA SIZE PERM [page=4k|16k|64k|2m|32m|512m|1g|max] [mem=wb|uc|wc|wt]
  unmap GPA SIZE       protect GPA SIZE PERM   wrprotect GPA SIZE   touch GPA r|w|x
  age GPA SIZE         dirty GPA SIZE          change GPA PA        zapchange GPA PA
  split GPA SIZE       collapse GPA SIZE       walk GPA             flushes   stats   dump";

const DUMP_EXAMPLES: &str = "\
Examples:
  An image whose first entry links to the table in its second page:
  $ printf '\\007\\020' | cat - /dev/zero | head -c 8192 >table.img
  $ spte dump --format ept --root 0 table.img

  The root of an arm64 guest with 40 bits is two tables of 4K side by side; the second has a block here:
  $ printf '\\375\\007' | cat - /dev/zero | head -c 4096 | cat table.img - | tail -c 8192 >stage2.img
  $ spte dump --format arm64-s2 --root 0 stage2.img

  The first image as memory that begins at 4G has it: the link leads out of the image now.
  $ spte dump --format ept --root 0x100000000 --base 0x100000000 --json table.img || true";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  $ spte completions bash >spte.bash
  $ spte completions zsh >_spte";

/// Page-table entries in words, scripts run on real tables, tables in images of memory.
#[derive(Debug, Parser)]
#[command(name = "spte", version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Debug, Subcommand)]
enum Cmd {
    /// Explain raw entries: each field, and the rule that an impossible entry breaks
    #[command(after_help = DECODE_EXAMPLES)]
    Decode(Decode),
    /// Run a script on a fresh table
    #[command(after_help = RUN_EXAMPLES)]
    Run(Run),
    /// Print a table that lies in a raw image of memory
    #[command(after_help = DUMP_EXAMPLES)]
    Dump(Dump),
    /// Print what a shell needs to complete this command
    #[command(after_help = COMPLETIONS_EXAMPLES)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
struct SetupArgs {
    /// The format of the table
    #[arg(long)]
    format: FormatName,
    /// The smallest page; x86 has 4k [default: 4k]
    #[arg(long)]
    granule: Option<Granule>,
    /// Bits of a guest physical address [default: 48, x86-64-la57: 57, arm64-s2: 40, ppc-radix: 52]
    #[arg(long, value_name = "N")]
    ipa_bits: Option<u32>,
    /// Bits of an output address [default: 52, arm64-s2 and mips64: 48]
    #[arg(long, value_name = "N")]
    pa_bits: Option<u32>,
    /// Levels of the table [default: 4, or 5 where the guest's addresses need them; arm64-s2 and mips64: as few as there can be]
    #[arg(long, value_name = "N")]
    levels: Option<u8>,
    /// Hardware sets accessed and dirty [default: on, arm64-s2: off, mips64: never]
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true, default_missing_value = "on")]
    hw_ad: Option<Switch>,
}

impl SetupArgs {
    fn setup(&self) -> Result<Setup, SetupError> {
        let options = Options {
            granule: self.granule.map(Granule::bytes),
            ipa_bits: self.ipa_bits,
            pa_bits: self.pa_bits,
            levels: self.levels,
            hw_ad: self.hw_ad.map(|switch| switch == Switch::On),
        };
        Setup::new(self.format, &options)
    }
}

#[derive(Debug, Args)]
struct Decode {
    #[command(flatten)]
    setup: SetupArgs,
    /// The level that the entries stand at, by the architecture's number; else every level is shown
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    level: Option<i8>,
    /// Print the bits of entries that dumps print, for each level
    #[arg(long)]
    mask: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Entries: 0x and hex digits, or the 16 bare digits of a log
    #[arg(value_name = "VALUE", required_unless_present = "mask")]
    values: Vec<String>,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    setup: SetupArgs,
    /// One JSON object a command
    #[arg(long)]
    json: bool,
    /// The script; - is standard input
    #[arg(default_value = "-")]
    file: PathBuf,
}

#[derive(Debug, Args)]
struct Dump {
    #[command(flatten)]
    setup: SetupArgs,
    /// Address of the root table
    #[arg(long, value_name = "ADDR", value_parser = script::number)]
    root: u64,
    /// Address of the image's first byte
    #[arg(long, value_name = "ADDR", value_parser = script::number, default_value = "0")]
    base: u64,
    /// Address of a table that holds nothing: links to it are empty entries, as in a MIPS kernel's directories
    #[arg(long, value_name = "ADDR", value_parser = script::number)]
    empty: Vec<u64>,
    /// Print entries with all their bits, not those of spte decode --mask alone
    #[arg(long)]
    raw: bool,
    /// The most rows to print
    #[arg(long, value_name = "N", default_value_t = 1 << 20)]
    limit: u64,
    /// One JSON object a row
    #[arg(long)]
    json: bool,
    /// The image
    file: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Granule {
    #[value(name = "4k")]
    Four,
    #[value(name = "16k")]
    Sixteen,
    #[value(name = "64k")]
    SixtyFour,
}

impl Granule {
    fn bytes(self) -> u64 {
        match self {
            Self::Four => 4 << 10,
            Self::Sixteen => 16 << 10,
            Self::SixtyFour => 64 << 10,
        }
    }
}

impl ValueEnum for FormatName {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.word()))
    }
}

/// Why the command failed.
#[derive(Debug, Error)]
enum CliError {
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Entry(#[from] NotAnEntry),
    #[error("format {format} has no level {level}")]
    Level { format: FormatName, level: i8 },
    /// Without a prefix: the contract has the words.
    #[error("line {line}: {why}")]
    Script { line: u64, why: LineError },
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    /// Nobody reads any more.
    #[error("writing: {0}")]
    Output(io::Error),
}

/// Why a line of a script was not carried out.
#[derive(Debug, Error)]
enum LineError {
    #[error(transparent)]
    Parse(#[from] ParseError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Read(#[from] io::Error),
}

/// Runs the command with these arguments, of which the first is its own name. The exit status.
pub fn run<I>(arguments: I, stdin: &mut dyn BufRead, stdout: &mut dyn Write, stderr: &mut dyn Write) -> u8
where
    I: IntoIterator<Item = OsString>,
{
    let parsed = Cli::try_parse_from(joined(arguments));
    let result = match parsed {
        Ok(cli) => match cli.command {
            Cmd::Decode(args) => decode_entries(&args, stdout),
            Cmd::Run(args) => run_script(&args, stdin, stdout),
            Cmd::Dump(args) => dump_image(&args, stdout),
            Cmd::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "spte", &mut script);
                stdout.write_all(&script).map_err(CliError::Output)
            }
        },
        Err(message) => {
            let status = if message.use_stderr() { FAILED } else { 0 };
            let to: &mut dyn Write = if message.use_stderr() { stderr } else { stdout };
            let written = write!(to, "{message}").and_then(|()| to.flush());
            return if written.is_ok() { status } else { FAILED };
        }
    };
    // Earlier output stands, and comes first.
    let flushed = stdout.flush().map_err(CliError::Output);
    match result.and(flushed) {
        Ok(()) => 0,
        Err(error) => {
            match &error {
                CliError::Output(source) if source.kind() == io::ErrorKind::BrokenPipe => {}
                CliError::Script { .. } => drop(writeln!(stderr, "{error}")),
                error => drop(writeln!(stderr, "spte: {error}")),
            }
            FAILED
        }
    }
}

/// `--hw-ad off` is `--hw-ad=off`: the option also stands without a value, so that a file behind it would be taken for one.
fn joined<I: IntoIterator<Item = OsString>>(arguments: I) -> Vec<OsString> {
    let mut joined: Vec<OsString> = Vec::new();
    for argument in arguments {
        let on_or_off = argument == OsStr::new("on") || argument == OsStr::new("off");
        match joined.last_mut() {
            Some(last) if on_or_off && last == OsStr::new("--hw-ad") => {
                last.push("=");
                last.push(&argument);
            }
            _ => joined.push(argument),
        }
    }
    joined
}

// ---- decode ----

fn decode_entries(args: &Decode, out: &mut dyn Write) -> Result<(), CliError> {
    let setup = args.setup.setup()?;
    let values = args.values.iter().map(|word| decode::entry(word)).collect::<Result<Vec<u64>, _>>()?;
    setup.for_entries(Decoding { args, format: setup.format(), values: &values, out })?
}

struct Decoding<'a> {
    args: &'a Decode,
    format: FormatName,
    values: &'a [u64],
    out: &'a mut dyn Write,
}

impl Use for Decoding<'_> {
    type Output = Result<(), CliError>;

    fn with<F: ToolFormat>(self, format: F) -> Self::Output {
        let Self { args, values, out, .. } = self;
        let level: Option<Level> = match args.level {
            None => None,
            Some(number) => {
                Some(format.level_of(number).ok_or(CliError::Level { format: self.format, level: number })?)
            }
        };
        if args.mask {
            let masks = decode::masks(&format, level);
            for (level, form, mask) in &masks {
                let word = form.word();
                if args.json {
                    let object = json!({ "level": level, "form": word, "mask": format!("{mask:016x}") });
                    writeln!(out, "{object}").map_err(CliError::Output)?;
                } else {
                    writeln!(out, "L{level} {mask:016x} {word}").map_err(CliError::Output)?;
                }
            }
            if !args.json {
                writeln!(out, "end {}", masks.len()).map_err(CliError::Output)?;
            }
        }
        for raw in values {
            let written = if args.json {
                writeln!(out, "{}", decode::json(&format, level, *raw))
            } else {
                write!(out, "{}", decode::text(&format, level, *raw))
            };
            written.map_err(CliError::Output)?;
        }
        Ok(())
    }
}

// ---- run ----

fn open(path: &Path) -> Result<File, CliError> {
    File::open(path).map_err(|source| CliError::File { path: path.into(), source })
}

fn run_script(args: &Run, stdin: &mut dyn BufRead, out: &mut dyn Write) -> Result<(), CliError> {
    let setup = args.setup.setup()?;
    let json = args.json;
    if args.file == Path::new("-") {
        setup.for_table(Running { setup, json, script: stdin, out })?
    } else {
        let mut script = BufReader::new(open(&args.file)?);
        setup.for_table(Running { setup, json, script: &mut script, out })?
    }
}

struct Running<'a> {
    setup: Setup,
    json: bool,
    script: &'a mut dyn BufRead,
    out: &'a mut dyn Write,
}

impl Use for Running<'_> {
    type Output = Result<(), CliError>;

    fn with<F: ToolFormat>(self, format: F) -> Self::Output {
        let Self { setup, json, script, out } = self;
        let limits = Limits { granule: setup.granule(), gpa_bits: setup.ipa_bits(), pa_bits: setup.pa_bits() };
        let mut machine = Machine::new(format, limits, setup.hw_ad())?;
        let mut bytes = Vec::new();
        let mut line = 0;
        loop {
            line += 1;
            bytes.clear();
            let failed = |why: LineError| CliError::Script { line, why };
            if script.read_until(b'\n', &mut bytes).map_err(|why| failed(why.into()))? == 0 {
                return Ok(());
            }
            let Some(command) = script::parse(&bytes).map_err(|why| failed(why.into()))? else { continue };
            let answer = machine.run(&command).map_err(|why| failed(why.into()))?;
            let written = if json {
                writeln!(out, "{}", answer.to_json(line, command.name()))
            } else {
                writeln!(out, "{answer}")
            };
            written.map_err(CliError::Output)?;
        }
    }
}

// ---- dump ----

fn dump_image(args: &Dump, out: &mut dyn Write) -> Result<(), CliError> {
    let setup = args.setup.setup()?;
    let image = Image::new(open(&args.file)?, args.base)?;
    setup.for_entries(Dumping { args, image, out })?
}

struct Dumping<'a> {
    args: &'a Dump,
    image: Image<File>,
    out: &'a mut dyn Write,
}

impl Use for Dumping<'_> {
    type Output = Result<(), CliError>;

    fn with<F: ToolFormat>(self, format: F) -> Self::Output {
        let Self { args, mut image, out } = self;
        let mut rows = 0_u64;
        let mut unread = None;
        let walk = Walk { root: args.root, empty: &args.empty, limit: args.limit };
        let walked = image::walk(&format, &mut image, walk, |entry| {
            rows += 1;
            let level = format.level_number(entry.level);
            let gpa = entry.gpa;
            let raw = if args.raw { entry.raw } else { format.masked(entry.level, entry.raw) };
            let trouble = match &entry.trouble {
                None => None,
                Some(Trouble::Impossible(why)) => Some(format!("impossible: {}", why.rule)),
                Some(Trouble::Loop { table }) => Some(format!("links back to the table at {:#x}", table.as_u64())),
                Some(Trouble::Unread(why)) => Some(why.to_string()),
            };
            let written = match (&trouble, args.json) {
                (_, true) => {
                    let (gpa, raw) = (format!("{gpa:#x}"), format!("{raw:016x}"));
                    let kind = decode::kind(&entry.reading);
                    let object = json!({ "level": level, "gpa": gpa, "raw": raw, "kind": kind, "trouble": trouble });
                    writeln!(out, "{object}")
                }
                (None, false) => writeln!(out, "L{level} {gpa:#x} {raw:016x}"),
                (Some(trouble), false) => writeln!(out, "L{level} {gpa:#x} {raw:016x} # {trouble}"),
            };
            if let Some(Trouble::Unread(why)) = entry.trouble {
                unread.get_or_insert(why);
            }
            written.map_err(CliError::Output)
        });
        walked?;
        if !args.json {
            writeln!(out, "end {rows}").map_err(CliError::Output)?;
        }
        unread.map_or(Ok(()), |why| Err(why.into()))
    }
}
