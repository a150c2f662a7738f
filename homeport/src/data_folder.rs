//! Whose the files in the data folder are.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, lchown};
use std::path::Path;

/// Gives what root has made in somebody else's data folder to that somebody: `homeport rooms restore-backup`, typed by
/// root, must not leave an archive that the service cannot open. Does nothing for others, who cannot.
pub(crate) fn give_to_its_owner(folder: &Path) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let owner = match fs::symlink_metadata(folder) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if owner.uid() == 0 {
        return Ok(());
    }
    give(folder, owner.uid(), owner.gid())
}

fn give(folder: &Path, user: u32, group: u32) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        // What has several names may be somebody's outside of this folder.
        let only_here = metadata.is_dir() || metadata.nlink() == 1;
        if metadata.uid() == 0 && only_here {
            lchown(entry.path(), Some(user), Some(group))?;
        }
        if metadata.is_dir() {
            give(&entry.path(), user, group)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_root_made_is_the_owners_and_what_others_made_stays_theirs() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can give files away");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("acme")).unwrap();
        for name in ["archive.sqlite", "acme/key.pem", "another's", "of two names"] {
            fs::write(path(name), "").unwrap();
        }
        let outside = tempfile::tempdir_in(folder.path().parent().unwrap()).unwrap();
        fs::hard_link(path("of two names"), outside.path().join("first")).unwrap();
        lchown(path("another's"), Some(77), Some(77)).unwrap();
        let owner = |name: &str| fs::symlink_metadata(path(name)).unwrap().uid();

        give_to_its_owner(folder.path()).unwrap();
        assert_eq!(owner("archive.sqlite"), 0, "the folder is root's");
        lchown(folder.path(), Some(99), Some(98)).unwrap();
        give_to_its_owner(folder.path()).unwrap();
        assert_eq!(["archive.sqlite", "acme", "acme/key.pem"].map(owner), [99; 3]);
        assert_eq!((owner("another's"), owner("of two names")), (77, 0));
        give_to_its_owner(&path("not there")).unwrap();
    }
}
