//! Files that nobody but their owner may read, written whole or not at all.

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Writes a file, in place of what is there.
pub(crate) fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    fs::rename(prepare(path, content)?, path)
}

/// Writes a file unless there is one. Returns whether it did.
pub(crate) fn create(path: &Path, content: &[u8]) -> io::Result<bool> {
    let prepared = prepare(path, content)?;
    // Of several processes that do this at once, one succeeds.
    let linked = fs::hard_link(&prepared, path);
    fs::remove_file(&prepared)?;
    match linked {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// The content in a file beside `path`, on disk.
fn prepare(path: &Path, content: &[u8]) -> io::Result<PathBuf> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(ErrorKind::InvalidInput)?.to_string_lossy();
    let prepared = folder.join(format!(".{name}.{:016x}", rand::random::<u64>()));
    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&prepared)?;
    file.write_all(content)?;
    file.sync_all()?;
    Ok(prepared)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_is_written_is_for_its_owner_alone_and_nothing_is_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key.pem");
        assert!(create(&file, b"one").unwrap() && !create(&file, b"two").unwrap());
        assert_eq!(fs::read(&file).unwrap(), b"one");
        write(&file, b"three").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"three");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
