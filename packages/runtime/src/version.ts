/** Owns the version that services announce and `lamina --version` prints. */
export const VERSION = '0.1.0';
