// Templates that escape all values, and preact's hooks.
import { h } from '../vendor/preact.js';
import htm from '../vendor/htm.js';

export const html = htm.bind(h);
export { useEffect, useId, useMemo, useRef, useState } from '../vendor/hooks.js';
