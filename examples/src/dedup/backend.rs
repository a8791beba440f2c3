// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which back end a run has, and why.

use notifier_linux::{Feature, Features, Kernel, Missing};

use super::{cli::Backend, table::TableFormat};
use crate::machine::{self, NoKvm};

/// Why guests cannot run on KVM here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoBackend {
    /// KVM itself.
    #[error(transparent)]
    Kvm(#[from] NoKvm),
    /// The host's memory cannot be changed under a running guest.
    #[error(transparent)]
    Host(#[from] Missing),
}

/// What guests run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Chosen {
    Software,
    Kvm,
}

impl Chosen {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Software => "software",
            Self::Kvm => "kvm",
        }
    }
}

/// What `wanted` comes to on this host; and why, where it was left open. Whoever asks for a format wants all to walk it,
/// and vCPUs on KVM walk their processor's.
pub(crate) fn choose(wanted: Backend, format: Option<TableFormat>) -> Result<(Chosen, Option<String>), NoBackend> {
    match wanted {
        Backend::Auto if format.is_some() => Ok((Chosen::Software, Some("for the format".into()))),
        Backend::Software => Ok((Chosen::Software, None)),
        Backend::Kvm => probe().map(|()| (Chosen::Kvm, None)),
        Backend::Auto => Ok(match probe() {
            Ok(()) => (Chosen::Kvm, Some("/dev/kvm opens".into())),
            Err(why) => (Chosen::Software, Some(why.to_string())),
        }),
    }
}

fn probe() -> Result<(), NoBackend> {
    machine::probe()?;
    let features = Features::detect(&Kernel::new());
    for feature in
        [Feature::WriteProtect, Feature::WriteProtectUnpopulated, Feature::WriteProtectShared, Feature::Populate]
    {
        features.require(feature)?;
    }
    Ok(())
}
