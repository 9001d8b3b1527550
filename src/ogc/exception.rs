//! OGC exceptions as XML, in the form that a service's version expects.

/// What went wrong, in the words of the OGC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exception<'a> {
    /// `MissingParameterValue`, `NoApplicableCode`, …
    pub code: &'a str,
    /// The parameter that is to blame.
    pub locator: Option<&'a str>,
    pub text: &'a str,
}

/// Content-Type of [`Exception::to_xml`].
pub const CONTENT_TYPE: &str = "text/xml; charset=utf-8";

impl Exception<'_> {
    /// The report that a client of `service` in `version` can read. Without a
    /// known service it is the one of WMS 1.3.0.
    pub fn to_xml(&self, service: Option<&str>, version: Option<&str>) -> String {
        let service = service.unwrap_or_default().to_ascii_uppercase();
        let version = version.unwrap_or_default();
        let major_minor = |prefix: &str| version.starts_with(prefix);
        match service.as_str() {
            "WFS" if major_minor("1.0") => self.service_exception("1.2.0"),
            "WFS" if major_minor("1.1") => self.report("http://www.opengis.net/ows", "1.0.0"),
            "WFS" => self.report("http://www.opengis.net/ows/1.1", "2.0.0"),
            "WCS" if major_minor("1.0") => self.service_exception("1.2.0"),
            "WCS" if major_minor("1.1") => self.report("http://www.opengis.net/ows/1.1", "1.1.0"),
            "WCS" => self.report("http://www.opengis.net/ows/2.0", "2.0.0"),
            "WMTS" => self.report("http://www.opengis.net/ows/1.1", "1.0.0"),
            "WMS" if major_minor("1.1") => self.service_exception("1.1.1"),
            _ => self.service_exception("1.3.0"),
        }
    }

    /// WMS 1.3.0 clause 7.3.3.11 and its ancestors.
    fn service_exception(&self, version: &str) -> String {
        let (code, locator, text) = self.escaped();
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <ServiceExceptionReport version=\"{version}\" xmlns=\"http://www.opengis.net/ogc\">\n \
             <ServiceException code=\"{code}\"{locator}>{text}</ServiceException>\n\
             </ServiceExceptionReport>\n"
        )
    }

    /// OWS Common clause 8.
    fn report(&self, namespace: &str, version: &str) -> String {
        let (code, locator, text) = self.escaped();
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
             <ows:ExceptionReport xmlns:ows=\"{namespace}\" version=\"{version}\" xml:lang=\"en\">\n \
             <ows:Exception exceptionCode=\"{code}\"{locator}>\
             <ows:ExceptionText>{text}</ows:ExceptionText></ows:Exception>\n\
             </ows:ExceptionReport>\n"
        )
    }

    /// The code, the locator as an attribute if there is one, and the text.
    fn escaped(&self) -> (String, String, String) {
        let locator = self
            .locator
            .map(|name| format!(" locator=\"{}\"", escape(name)));
        let locator = locator.unwrap_or_default();
        (escape(self.code), locator, escape(self.text))
    }
}

/// As QGIS writes what is no service's (`QgsServerException::formatResponse`).
pub fn of_qgis(text: &str) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ServerException>{}</ServerException>\n",
        escape(text)
    )
}

/// `text` as XML character data or attribute value. Characters that XML 1.0
/// has no way to write become U+FFFD.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            '\t' | '\n' | '\r' => out.push(' '),
            '\0'..='\x1f' | '\u{FFFE}' | '\u{FFFF}' => out.push('\u{FFFD}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Exception<'static> {
        Exception {
            code: "InvalidParameterValue",
            locator: Some("MAP"),
            text: "Project '<a b=\"c\">&\u{1}' not found",
        }
    }

    #[test]
    fn each_version_gets_its_own_root_and_namespace() {
        for (service, version, root, namespace) in [
            (
                Some("WMS"),
                None,
                "ServiceExceptionReport",
                "http://www.opengis.net/ogc",
            ),
            (
                Some("wms"),
                Some("1.1.1"),
                "ServiceExceptionReport",
                "http://www.opengis.net/ogc",
            ),
            (
                Some("WFS"),
                Some("1.0.0"),
                "ServiceExceptionReport",
                "http://www.opengis.net/ogc",
            ),
            (
                Some("WFS"),
                Some("1.1.0"),
                "ExceptionReport",
                "http://www.opengis.net/ows",
            ),
            (
                Some("WFS"),
                Some("2.0.0"),
                "ExceptionReport",
                "http://www.opengis.net/ows/1.1",
            ),
            (
                Some("WCS"),
                Some("1.1.1"),
                "ExceptionReport",
                "http://www.opengis.net/ows/1.1",
            ),
            (
                Some("WCS"),
                None,
                "ExceptionReport",
                "http://www.opengis.net/ows/2.0",
            ),
            (
                Some("WMTS"),
                None,
                "ExceptionReport",
                "http://www.opengis.net/ows/1.1",
            ),
            (
                None,
                None,
                "ServiceExceptionReport",
                "http://www.opengis.net/ogc",
            ),
        ] {
            let xml = sample().to_xml(service, version);
            let document = roxmltree::Document::parse(&xml).expect(&xml);
            let name = document.root_element().tag_name();
            assert_eq!(
                (name.name(), name.namespace()),
                (root, Some(namespace)),
                "{service:?}"
            );
        }
    }

    #[test]
    fn the_text_of_a_client_stays_text() {
        for service in ["WMS", "WFS"] {
            let xml = sample().to_xml(Some(service), None);
            let document = roxmltree::Document::parse(&xml).expect(&xml);
            let text: String = document
                .descendants()
                .filter(|node| node.is_text())
                .filter_map(|node| node.text())
                .collect();
            assert_eq!(text.trim(), "Project '<a b=\"c\">&\u{FFFD}' not found");
            let exception = document
                .root_element()
                .first_element_child()
                .expect("an exception");
            assert_eq!(exception.attribute("locator"), Some("MAP"));
        }
    }
}
