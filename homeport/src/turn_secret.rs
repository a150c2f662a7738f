//! The TURN secret of a server that nobody gave one: made up once, and kept beside the archive. Processes that share the
//! folder share the secret.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::Context as _;
use rand::Rng as _;
use rand::distr::Alphanumeric;

use crate::private_file;

const FILE_NAME: &str = "turn-secret";

/// The secret in `folder`; `None` when there is none yet.
pub(crate) fn load(folder: &Path) -> anyhow::Result<Option<String>> {
    let path = folder.join(FILE_NAME);
    match fs::read_to_string(&path) {
        Ok(secret) => Ok(Some(secret.trim().to_owned()).filter(|secret| !secret.is_empty())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// The secret in `folder`, made up when there is none.
pub(crate) fn load_or_create(folder: &Path) -> anyhow::Result<String> {
    if let Some(secret) = load(folder)? {
        return Ok(secret);
    }
    let path = folder.join(FILE_NAME);
    let secret: String = rand::rng().sample_iter(Alphanumeric).take(43).map(char::from).collect();
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        // An empty file is what a full disk has left of an earlier version.
        if fs::metadata(&path).is_ok_and(|file| file.len() == 0) {
            fs::remove_file(&path)?;
        }
        private_file::create(&path, secret.as_bytes()).map(drop)
    };
    write().with_context(|| format!("cannot write {} (setting seed.data)", path.display()))?;
    // Another process may have been faster.
    load(folder)?.with_context(|| format!("{} is empty", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_secret_is_made_up_once_and_kept_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let first = load_or_create(&data).unwrap();
        assert_eq!(first.len(), 43);
        assert_eq!(load_or_create(&data).unwrap(), first);
        let mode = fs::metadata(data.join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
