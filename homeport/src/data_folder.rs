//! Whose the files in the data folder are.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Uid, chownat, fstat, openat, statat};
use rustix::io::Errno;

/// Gives what root has made in somebody else's data folder to that somebody: `homeport rooms restore-backup`, typed by
/// root, must not leave an archive that the service cannot open. Does nothing for others, who cannot.
pub(crate) fn give_to_its_owner(folder: &Path) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let folder = match openat(CWD, folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        folder => folder?,
    };
    let owner = fstat(&folder)?;
    if owner.st_uid == 0 {
        return Ok(());
    }
    give(folder.as_fd(), Uid::from_raw(owner.st_uid), Gid::from_raw(owner.st_gid))?;
    Ok(())
}

/// By descriptors, not by paths: the owner may put a link in the place of anything meanwhile, and must not be given what is
/// behind it.
fn give(folder: BorrowedFd<'_>, user: Uid, group: Gid) -> rustix::io::Result<()> {
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        let found = match statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            // SQLite's own files come and go.
            Err(Errno::NOENT) => continue,
            found => found?,
        };
        let kind = FileType::from_raw_mode(found.st_mode);
        // What has several names may be somebody's outside of this folder.
        let is_only_here = kind.is_dir() || (!kind.is_symlink() && found.st_nlink == 1);
        if found.st_uid == 0 && is_only_here {
            chownat(folder, name, Some(user), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if kind.is_dir() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            give(openat(folder, name, flags, Mode::empty())?.as_fd(), user, group)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, lchown, symlink};

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
        fs::write(outside.path().join("root's"), "").unwrap();
        symlink(outside.path(), path("elsewhere")).unwrap();
        let owner = |name: &str| fs::symlink_metadata(path(name)).unwrap().uid();

        give_to_its_owner(folder.path()).unwrap();
        assert_eq!(owner("archive.sqlite"), 0, "the folder is root's");
        lchown(folder.path(), Some(99), Some(98)).unwrap();
        give_to_its_owner(folder.path()).unwrap();
        assert_eq!(["archive.sqlite", "acme", "acme/key.pem"].map(owner), [99; 3]);
        assert_eq!((owner("another's"), owner("of two names"), owner("elsewhere")), (77, 0, 0));
        assert_eq!(fs::metadata(outside.path().join("root's")).unwrap().uid(), 0);
        give_to_its_owner(&path("not there")).unwrap();
    }
}
