//! The TURN secret of a server that nobody gave one: made up once, and kept beside the archive.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::Context as _;
use rand::Rng as _;
use rand::distr::Alphanumeric;

const FILE_NAME: &str = "turn-secret";

/// The secret in `folder`, made up when there is none.
pub(crate) fn load_or_create(folder: &Path) -> anyhow::Result<String> {
    let path = folder.join(FILE_NAME);
    match fs::read_to_string(&path) {
        Ok(secret) if !secret.trim().is_empty() => return Ok(secret.trim().to_owned()),
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
    let secret: String = rand::rng().sample_iter(Alphanumeric).take(43).map(char::from).collect();
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(folder)?;
        let mut file = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
        file.write_all(secret.as_bytes())?;
        file.sync_all()
    };
    write().with_context(|| format!("cannot write {} (setting seed.data)", path.display()))?;
    Ok(secret)
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
