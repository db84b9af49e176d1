// The served bank, requested once for all pages.
import { call } from '../api.js';
import { useEffect, useState } from './html.js';

let asked;

/** [bank or null, failure or null]. */
export function useBank() {
	const [known, setKnown] = useState([null, null]);
	useEffect(() => {
		let here = true;
		asked ??= call('GET', '/bank');
		asked.then((bank) => here && setKnown([bank, null]), (error) => {
			asked = undefined;
			if (here) setKnown([null, error]);
		});
		return () => { here = false; };
	}, []);
	return known;
}
