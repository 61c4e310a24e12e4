"""DICOM in and out, for which pydicom is needed."""
