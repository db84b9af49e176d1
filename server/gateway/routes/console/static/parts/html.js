// Templates that escape all values, preact's hooks, and the width of an element.
import { h } from '../vendor/preact.js';
import htm from '../vendor/htm.js';
import { useEffect, useRef, useState } from '../vendor/hooks.js';

export const html = htm.bind(h);
export { useEffect, useId, useMemo, useRef, useState } from '../vendor/hooks.js';

/** [reference to an element, its current width in pixels]. */
export function useWidth() {
	const around = useRef();
	const [wide, setWide] = useState(600);
	useEffect(() => {
		const sized = new ResizeObserver(([{ contentRect }]) => setWide(Math.round(contentRect.width)));
		sized.observe(around.current);
		return () => sized.disconnect();
	}, []);
	return [around, wide];
}
