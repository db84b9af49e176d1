// The served bank.
import { call } from '../api.js';
import { useEffect, useState } from './html.js';

/** [bank or null, failure or null]. */
export function useBank() {
	const [known, setKnown] = useState([null, null]);
	useEffect(() => { call('GET', '/bank').then((bank) => setKnown([bank, null]), (error) => setKnown([null, error])); }, []);
	return known;
}
