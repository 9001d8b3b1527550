//! What GDAL says, as our log lines instead of its own on standard error.
//!
//! GDAL calls its handler from any thread that draws, and holds a lock meanwhile. One in
//! Python, as its bindings have it, would wait there for the interpreter, and whoever has
//! that may wait for the lock. So ours is a function without Python, for all threads.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::sync::OnceLock;

/// Takes `level` and `text` of a message, on the thread that has something to say.
type Listener = Box<dyn Fn(&str, &str) + Send + Sync>;

/// `CPLErrorHandler`.
type Handler = unsafe extern "C" fn(c_int, c_int, *const c_char);

/// `CPLSetErrorHandler`.
type SetHandler = unsafe extern "C" fn(Handler) -> *mut c_void;

static LISTENER: OnceLock<Listener> = OnceLock::new();

/// From now on GDAL tells `listener`. `library` is loaded, and GDAL among what it was linked
/// with. False if it is not.
pub fn listen(library: &Path, listener: Listener) -> bool {
    let Some(set) = set_handler(library) else {
        return false;
    };
    if LISTENER.set(listener).is_ok() {
        // SAFETY: the signature is that of GDAL 1 to 3, and the handler lives as long as
        // the process.
        unsafe { set(hear) };
    }
    true
}

/// GDAL's version has a part in the name of its file, so it is found through who uses it.
fn set_handler(library: &Path) -> Option<SetHandler> {
    let file = CString::new(library.as_os_str().as_encoded_bytes()).ok()?;
    // SAFETY: nothing is loaded that is not there, and the handle is never closed. The
    // symbol has this signature wherever it exists.
    unsafe {
        let handle = libc::dlopen(file.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD);
        if handle.is_null() {
            return None;
        }
        let symbol = libc::dlsym(handle, c"CPLSetErrorHandler".as_ptr());
        (!symbol.is_null()).then(|| std::mem::transmute::<*mut c_void, SetHandler>(symbol))
    }
}

unsafe extern "C" fn hear(class: c_int, _number: c_int, text: *const c_char) {
    let Some(listener) = LISTENER.get().filter(|_| !text.is_null()) else {
        return;
    };
    // SAFETY: GDAL gives a string that ends and that lives as long as this call.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let text = text.trim_end();
    listener(level(class, text), text);
}

/// Of a `CPLErr`. QGIS wants GDAL to do without drivers that few builds of GDAL have, and
/// each worker of all others would say so: nobody can act on that.
fn level(class: c_int, text: &str) -> &'static str {
    match class {
        0 | 1 => "debug",
        2 if text.ends_with("to unload from GDAL_SKIP environment variable.") => "debug",
        2 => "warning",
        _ => "error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_not_missed_is_no_warning() {
        let text = "Unable to find driver ECW to unload from GDAL_SKIP environment variable.";
        assert_eq!(level(2, text), "debug");
        assert_eq!(level(2, "The file is truncated."), "warning");
    }

    #[test]
    fn a_library_that_is_not_loaded_or_knows_no_gdal_is_no_mistake() {
        let files = ["/nowhere/libqgis_core.so", "libc.so.6", "a\0b"];
        assert!(
            files
                .iter()
                .all(|file| set_handler(Path::new(file)).is_none())
        );
    }
}
